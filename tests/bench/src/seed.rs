//! Puts many objects where the API server keeps them, past the API server.
//!
//! In: Services and EndpointSlices. Out: the same in etcd, in JSON, which an API server reads as well as the form it
//! writes itself, and for each Service the IPAddress that assigns its ClusterIP. To ask the API server for each of
//! them takes longer than everything that is measured: 85 s for 10,000 Services, over 12 minutes for 50,000.

use anyhow::{Context as _, Result, ensure};
use http::Request;
use k8s_openapi::{
    ByteString,
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    serde_json::{self, Value, json},
};
use kube::Client;

use weir_tests::objects::NAMESPACE;

/// As many as etcd takes at once, by default.
const AT_ONCE: usize = 128;

/// An object, and the key it has in etcd.
pub(super) struct Stored {
    key: String,
    object: Value,
}

impl Stored {
    /// A Service of the family IPv4 with a ClusterIP, and that address.
    pub(super) fn service(service: &Service) -> Result<[Self; 2]> {
        let spec = service.spec.as_ref().context("a Service without a spec")?;
        let address = spec.cluster_ip.as_ref().context("a Service without a ClusterIP")?;
        let name = service.metadata.name.as_ref().context("a Service without a name")?;
        let mut object = serde_json::to_value(service)?;
        // The fields that the API server adds to a new one.
        let settled = json!({
            "type": "ClusterIP",
            "clusterIPs": [address],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
        });
        merge(&mut object["spec"], settled);
        let address = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "IPAddress",
            "metadata": {
                "name": address,
                "labels": {
                    "ipaddress.kubernetes.io/ip-family": "IPv4",
                    "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
                },
            },
            "spec": {
                "parentRef": { "group": "", "resource": "services", "namespace": NAMESPACE, "name": name },
            },
        });
        Ok([Self::new("services/specs", Some(NAMESPACE), object)?, Self::new("ipaddresses", None, address)?])
    }

    /// A slice.
    pub(super) fn slice(slice: &EndpointSlice) -> Result<Self> {
        Self::new("endpointslices", Some(NAMESPACE), serde_json::to_value(slice)?)
    }

    fn new(kind: &str, namespace: Option<&str>, mut object: Value) -> Result<Self> {
        let name = object["metadata"]["name"].as_str().context("an object without a name")?.to_owned();
        let place = namespace.map_or_else(String::new, |namespace| format!("{namespace}/"));
        let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let created = json!({ "uid": uid.trim(), "creationTimestamp": "2026-01-01T00:00:00Z" });
        merge(&mut object["metadata"], created);
        if let Some(namespace) = namespace {
            merge(&mut object["metadata"], json!({ "namespace": namespace }));
        }
        Ok(Self { key: format!("/registry/{kind}/{place}{name}"), object })
    }
}

fn merge(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

/// Writes all of these, with `etcd` to ask.
pub(super) async fn put(etcd: &Client, objects: &[Stored]) -> Result<()> {
    for some in objects.chunks(AT_ONCE) {
        let put = |stored: &Stored| -> Result<Value> {
            let key = ByteString(stored.key.clone().into_bytes());
            let value = ByteString(serde_json::to_vec(&stored.object)?);
            Ok(json!({ "requestPut": { "key": key, "value": value } }))
        };
        let puts = some.iter().map(put).collect::<Result<Vec<_>>>()?;
        let request = Request::post("/v3/kv/txn").body(serde_json::to_vec(&json!({ "success": puts }))?)?;
        let answer: Value = etcd.request(request).await.context("writing to etcd")?;
        ensure!(answer["succeeded"] == true, "etcd did not take objects: {answer}");
    }
    Ok(())
}
