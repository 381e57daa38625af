//! The model's rules, case by case.

mod node;
mod pods;
mod services;
mod slices;
