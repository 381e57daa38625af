//! Tests of the model, by rule.

mod node;
mod services;
mod slices;
