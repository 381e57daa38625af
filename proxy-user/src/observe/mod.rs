//! What the outside can see of the agent: logs, metrics, health and events.
//!
//! In: what `run` reports through cheap handles, [`Metrics`], [`Health`] and [`Events`]. Out: log lines, the HTTP
//! endpoints that kube-proxy has, and event objects. Of Services nothing here knows more than their names, of the
//! kernel nothing at all.

mod events;
mod health;
mod health_check;
mod metrics;
mod names;
mod process;
mod server;
mod sockets;
mod telemetry;

pub use events::{Events, Trouble};
pub use health::{Answer, Health, Moment, ProxyHealth, health_router};
pub use health_check::{HealthCheckState, HealthChecks};
pub use metrics::{Metrics, TrafficPolicy, metrics_router};
pub use server::{Server, ServerError};
pub use telemetry::{Telemetry, TelemetryError};
