//! Connections that are kept up for a server that is gone.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::Result;
use weir_tests::{apiserver::ApiServer, netns::Namespace, relay::Relay};

use super::agent::Agent;
use crate::api_objects::ApiObjects;

/// An API server wants to be at an address that others could reach.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

/// Drops all packets to and from these ports from now on.
fn lose(namespace: &Namespace, relay: &Relay) -> Result<()> {
    let ports: Vec<_> = relay.peers().iter().map(|peer| peer.port().to_string()).collect();
    assert!(!ports.is_empty(), "the agent is connected");
    let (relay, ports) = (relay.address().port(), ports.join(", "));
    let rules = format!(
        "table inet lost {{
            chain input {{
                type filter hook input priority 0;
                tcp dport {relay} tcp sport {{ {ports} }} drop
                tcp sport {relay} tcp dport {{ {ports} }} drop
            }}
        }}"
    );
    namespace.stdout("nft", &[&rules]).map(drop)
}

async fn changes_come(namespace: &Namespace) -> Result<()> {
    // The one that is left has seen as many changes as the one that goes.
    let sibling = ApiServer::start_at(ADDRESS.into(), &["--authorization-mode=AlwaysAllow"]).await?;
    let server = sibling.sibling().await?;
    let objects = ApiObjects::open(&sibling).await;
    objects.service_in_time("web").await;
    let relay = || Relay::start(server.socket().ip(), server.socket());
    let (acknowledging, losing) = (relay()?, relay()?);
    let start = async |relay: &Relay| {
        let servers = [format!("https://{}", relay.address())];
        let mut agent = Agent::start(server.kubeconfig("admin").unwrap(), &servers).await;
        agent.comes_to(&["web"]).await;
        (agent.lists(), agent)
    };
    let (lists, mut of_acknowledging) = start(&acknowledging).await;
    let (lists_of_losing, mut of_losing) = start(&losing).await;

    for relay in [&acknowledging, &losing] {
        relay.lead_to(sibling.socket());
    }
    acknowledging.fall_silent();
    lose(namespace, &losing)?;
    objects.service_in_time("late").await;
    tokio::join!(of_acknowledging.comes_to(&["late", "web"]), of_losing.comes_to(&["late", "web"]));
    for (agent, before) in [(&of_acknowledging, lists), (&of_losing, lists_of_losing)] {
        assert_eq!(agent.lists_since(&before), BTreeMap::new(), "the watches go on where they were");
    }
    Ok(())
}

#[test]
fn changes_come_by_another_connection_when_a_balancer_keeps_one_up_for_a_server_that_is_gone() -> Result<()> {
    let namespace = Namespace::new("balancer")?;
    namespace.ip(&[format!("address add {ADDRESS}/32 dev lo")])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    namespace.run(|| runtime.block_on(changes_come(&namespace)))
}
