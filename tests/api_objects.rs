//! The objects that suites write to a real API server.
//!
//! In: an [`ApiServer`]. Out: a namespace with Services, and rights for the user `weir`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fmt::Debug, time::Duration};

use k8s_openapi::api::{
    core::v1::{Namespace, Service},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use weir_tests::apiserver::ApiServer;

pub(crate) const NAMESPACE: &str = "shop";

pub(crate) async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + Debug + Serialize + DeserializeOwned + Resource,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
}

/// Writes objects through one API server.
pub(crate) struct ApiObjects(pub(crate) Client);

impl ApiObjects {
    pub(crate) async fn open(server: &ApiServer) -> Self {
        let client = server.client().await.unwrap();
        create::<Namespace>(&Api::all(client.clone()), json!({"metadata": {"name": NAMESPACE}})).await;
        Self(client)
    }

    pub(crate) fn services(&self) -> Api<Service> {
        Api::namespaced(self.0.clone(), NAMESPACE)
    }

    pub(crate) async fn service(&self, name: &str) -> Service {
        self.service_with(name, json!({})).await
    }

    /// A Service with these fields of its spec besides the port.
    pub(crate) async fn service_with(&self, name: &str, spec: Value) -> Service {
        let mut service = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
        service["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        create(&self.services(), service).await
    }

    /// Creates a Service as soon as the API server reaches its etcd.
    pub(crate) async fn service_in_time(&self, name: &str) {
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

    pub(crate) async fn delete_service(&self, name: &str) {
        self.services().delete(name, &DeleteParams::default()).await.unwrap();
    }

    /// Gives the user `weir` the rights of these rules.
    pub(crate) async fn allow(&self, rules: Value) {
        let role = json!({"metadata": {"name": "weir"}, "rules": rules});
        create::<ClusterRole>(&Api::all(self.0.clone()), role).await;
        let binding = json!({
            "metadata": {"name": "weir"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "weir"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "weir"}],
        });
        create::<ClusterRoleBinding>(&Api::all(self.0.clone()), binding).await;
    }
}
