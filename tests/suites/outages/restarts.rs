//! Servers that go and come back.

use std::collections::BTreeMap;

use weir::model::Kind;
use weir_tests::apiserver::ApiServer;

use super::agent::Agent;
use crate::api_objects::ApiObjects;

const OPTIONS: [&str; 1] = ["--authorization-mode=AlwaysAllow"];

fn one_of_each() -> BTreeMap<String, u64> {
    Kind::ALL.iter().map(|kind| (kind.to_string(), 1)).collect()
}

/// The API server learns nothing from its etcd while it is frozen, and what it should have learnt is gone when it goes on.
#[tokio::test]
async fn changes_that_etcd_compacted_are_listed_once() {
    let server = ApiServer::start(&OPTIONS).await.unwrap();
    let sibling = server.sibling().await.unwrap();
    let objects = ApiObjects::open(&sibling).await;
    objects.service_in_time("stays").await;
    objects.service_in_time("goes").await;
    let mut agent = Agent::start(server.kubeconfig("admin").unwrap(), &[]).await;
    agent.comes_to(&["goes", "stays"]).await;
    let before = agent.lists();

    server.freeze(true).unwrap();
    server.restart_etcd().await.unwrap();
    objects.service_in_time("comes").await;
    objects.delete_service("goes").await;
    server.compact().await.unwrap();
    server.freeze(false).unwrap();
    agent.comes_to(&["comes", "stays"]).await;
    // Only a list shows what is gone; the other kinds may come later, and one list of each does.
    objects.service_in_time("last").await;
    agent.comes_to(&["comes", "last", "stays"]).await;
    let lists = agent.lists_since(&before);
    assert_eq!(lists["Service"], 1, "{lists:?}");
    assert!(lists.values().all(|lists| *lists == 1), "{lists:?}");
}

#[tokio::test]
async fn a_server_that_goes_costs_no_list_where_another_has_the_changes_and_one_where_none_has() {
    // The one that is left has seen as many changes as the one that goes.
    let mut sibling = ApiServer::start(&OPTIONS).await.unwrap();
    let mut server = sibling.sibling().await.unwrap();
    let objects = ApiObjects::open(&sibling).await;
    objects.service_in_time("stays").await;
    objects.service_in_time("goes").await;
    let servers = [server.url(), sibling.url()];
    let mut agent = Agent::start(server.kubeconfig("admin").unwrap(), &servers).await;
    // A watch that has brought nothing and ends within a second is another matter.
    objects.service_in_time("brought").await;
    agent.comes_to(&["brought", "goes", "stays"]).await;
    let before = agent.lists();

    assert_eq!(agent.connection.server(), server.url().as_str(), "it asks the one that goes");
    server.stop();
    objects.service_in_time("comes").await;
    objects.delete_service("goes").await;
    agent.comes_to(&["brought", "comes", "stays"]).await;
    assert_eq!(agent.lists_since(&before), BTreeMap::new(), "the other server knows what came after");

    // One that starts has seen no change before its start.
    sibling.restart().await.unwrap();
    let objects = ApiObjects(sibling.client().await.unwrap());
    objects.service_in_time("last").await;
    agent.comes_to(&["brought", "comes", "last", "stays"]).await;
    let (lists, most) = (agent.lists_since(&before), one_of_each());
    assert!(lists.iter().all(|(kind, lists)| *lists <= most[kind]), "{lists:?}");
}
