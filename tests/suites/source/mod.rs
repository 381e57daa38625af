//! The Kubernetes source against a real API server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

mod pods;
mod services;

const PATIENCE: Duration = Duration::from_secs(30);
