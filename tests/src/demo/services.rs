//! The Services of the demo.

use anyhow::Result;
use k8s_openapi::{
    api::{
        core::v1::{Service, ServiceSpec},
        discovery::v1::{Endpoint, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use weir::model::{Family, Object};

use crate::{
    node::pod_address,
    objects::{Addresses, NAMESPACE, Shape, pod, service},
    subject::Subject,
};

/// The Service that most of the demo is about.
pub(super) const WEB: Addresses = Addresses::new(1).named("web");
/// A Service with session affinity.
pub(super) const STICKY: Addresses = Addresses::new(2).named("sticky");
/// A Service without endpoints.
pub(super) const EMPTY: Addresses = Addresses::new(3).named("empty");
/// A headless Service: it has a name and no address.
pub(super) const DB: &str = "db";
/// Node and number of the pods behind [`DB`].
pub(super) const DB_PODS: [(u8, u8); 3] = [(1, 1), (2, 1), (2, 2)];

/// Publishes all of them.
pub(super) fn publish_all(subject: &Subject<'_>) -> Result<()> {
    publish_web(subject, true)?;
    publish(subject, STICKY, &service([pod(1, 1), pod(1, 2), pod(2, 1), pod(2, 2)]).sticky(3600))?;
    publish(subject, EMPTY, &service([]))?;
    subject.publish(DB, headless())
}

/// Publishes [`WEB`] with one pod on node 1, and with one on node 2 where there are `two`.
pub(super) fn publish_web(subject: &Subject<'_>, two: bool) -> Result<()> {
    let endpoints = if two { vec![pod(1, 1), pod(2, 1)] } else { vec![pod(1, 1)] };
    publish(subject, WEB, &service(endpoints).everywhere())
}

fn publish(subject: &Subject<'_>, service: Addresses, shape: &Shape) -> Result<()> {
    subject.publish(&service.name(), shape.objects(service))
}

fn headless() -> Vec<Object> {
    let metadata = |name: &str| ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(NAMESPACE.to_owned()),
        labels: Some([("kubernetes.io/service-name".to_owned(), DB.to_owned())].into()),
        ..ObjectMeta::default()
    };
    let spec = ServiceSpec { cluster_ip: Some("None".to_owned()), ..ServiceSpec::default() };
    let endpoints = DB_PODS.map(|(node, pod)| Endpoint {
        addresses: vec![pod_address(Family::V4, node, pod).to_string()],
        ..Endpoint::default()
    });
    let slice = EndpointSlice {
        metadata: metadata("db-1"),
        address_type: Family::V4.to_string(),
        endpoints: Some(endpoints.to_vec()),
        ..EndpointSlice::default()
    };
    let service = Service { metadata: metadata(DB), spec: Some(spec), ..Service::default() };
    vec![Object::Service(Box::new(service)), Object::EndpointSlice(Box::new(slice))]
}
