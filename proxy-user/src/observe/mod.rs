//! What the outside can see of the agent: logs, metrics and health.
//!
//! In: what `run` reports through cheap handles, [`Metrics`] and [`Health`]. Out: log lines, and the HTTP endpoints
//! that kube-proxy has. Nothing here knows Services or the kernel.

mod health;
mod health_check;
mod metrics;
mod process;
mod server;
mod telemetry;

pub use health::{Answer, Health, Moment, ProxyHealth, health_router};
pub use health_check::{HealthCheckState, HealthChecks};
pub use metrics::{Metrics, TrafficPolicy, metrics_router};
pub use server::{Server, ServerError};
pub use telemetry::{Telemetry, TelemetryError};
