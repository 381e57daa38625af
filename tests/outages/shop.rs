//! The Services that the tests write.

use std::{fmt::Debug, time::Duration};

use k8s_openapi::api::core::v1::{Namespace, Service};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use weir_tests::apiserver::ApiServer;

pub(crate) const NAMESPACE: &str = "shop";

pub(crate) struct Shop(pub(crate) Client);

pub(crate) async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + Debug + Serialize + DeserializeOwned + Resource,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
}

impl Shop {
    pub(crate) async fn open(server: &ApiServer) -> Self {
        let client = server.client().await.unwrap();
        create::<Namespace>(&Api::all(client.clone()), json!({"metadata": {"name": NAMESPACE}})).await;
        Self(client)
    }

    fn services(&self) -> Api<Service> {
        Api::namespaced(self.0.clone(), NAMESPACE)
    }

    /// Creates a Service, as soon as the API server finds its etcd.
    pub(crate) async fn add(&self, name: &str) {
        let service = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
        let service = serde_json::from_value(service).unwrap();
        loop {
            match self.services().create(&PostParams::default(), &service).await {
                Ok(_) => return,
                Err(kube::Error::Api(status)) if status.is_already_exists() => return,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    pub(crate) async fn remove(&self, name: &str) {
        self.services().delete(name, &DeleteParams::default()).await.unwrap();
    }
}
