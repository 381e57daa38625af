//! Logs, metrics, health and events: all that users see of the agent.
//!
//! In: calls of `run` on the handles [`Metrics`], [`Health`] and [`Events`]. Out: log lines, kube-proxy's HTTP
//! endpoints, and event objects. This room knows Services by name only, and does not know the kernel.

mod admin;
mod drops;
mod event_writer;
mod events;
mod health;
mod health_check;
mod indicators;
mod metrics;
mod names;
mod planes;
mod process;
mod registration;
mod requests;
mod server;
mod services;
mod sockets;
mod telemetry;
mod text_format;
mod trouble;
mod watches;

pub use admin::{About, admin_router};
pub use drops::DropCount;
pub use events::Events;
pub use health::{Answer, Health, Moment, ProxyHealth, health_router};
pub use health_check::{HealthCheckState, HealthChecks};
pub use metrics::{Metrics, TrafficPolicy};
pub use server::{Server, ServerError};
pub use services::PortCount;
pub use telemetry::{Telemetry, TelemetryError};
pub use trouble::{Subject, Trouble};
