//! The HTTP servers of the agent: `/healthz` for load balancers, and `/metrics` for operators.
//!
//! In: health, metrics and the configuration. Out: two servers, each where the configuration has an address for it.

use tokio::sync::watch;

use crate::{
    config::Config,
    connection_limit::ConnectionLimit,
    observe::{About, Events, Health, Metrics, Server, Trouble, admin_router, health_router},
};

pub(super) async fn serve(
    config: Config,
    health: Health,
    metrics: Metrics,
    about: About,
    [health_limit, metrics_limit]: [ConnectionLimit; 2],
    events: Events,
    stopping: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let server = |name, reason, address, limit, router| {
        let (stopping, events) = (stopping.clone(), events.clone());
        async move {
            match address {
                Some(address) => {
                    let tell = move |error: &std::io::Error| {
                        let note = format!("{name} cannot be served at {address}: {error}");
                        events.report(Trouble::of_node(reason, "StartKubeProxy", note));
                    };
                    let server = Server::new(name, address, config.bind_hard_fail, limit);
                    server.run_and_report(router, stopping, tell).await
                }
                None => {
                    let mut stopping = stopping;
                    // An error means that the sender is gone, which is a stop too.
                    let _ = stopping.wait_for(|stop| *stop).await;
                    Ok(())
                }
            }
        }
    };
    tokio::try_join!(
        server(
            "healthz",
            "FailedToStartProxierHealthcheck",
            config.healthz,
            health_limit,
            health_router(&health, &metrics)
        ),
        server(
            "metrics",
            "FailedToStartMetricServer",
            config.metrics,
            metrics_limit,
            admin_router(&metrics, about)
        ),
    )?;
    Ok(())
}
