//! The Service that traffic goes to, among all the others.
//!
//! In: how many Services there should be. Out: a file of manifests for weir; the same target for an API server.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    serde_json::{from_value, json, to_writer},
};
use serde::Serialize;
use weir::model::Family;

use super::{
    super::cluster::{NODE, Numbered, node},
    topology::{LONE, SHARED, server_addresses},
};

const NAME: &str = "target";
/// The Service's port in front of [`LONE`].
const LONE_PORT: u16 = 80;
/// The Service's port in front of [`SHARED`].
const SHARED_PORT: u16 = 81;

/// Where the target's Service is, with the port that leads to this one.
pub(super) fn service_address(family: Family, port: u16) -> SocketAddr {
    let ip: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(10, 99, 0, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x99).into(),
    };
    SocketAddr::new(ip, if port == SHARED { SHARED_PORT } else { LONE_PORT })
}

/// The target's Service.
///
/// # Errors
///
/// When it is not what Kubernetes takes for one.
pub(super) fn service() -> anyhow::Result<Service> {
    let ips = Family::ALL.map(|family| service_address(family, LONE).ip().to_string());
    Ok(from_value(json!({
        "metadata": { "name": NAME },
        "spec": {
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                { "name": "lone", "port": LONE_PORT, "targetPort": LONE, "protocol": "TCP" },
                { "name": "datagrams", "port": LONE_PORT, "targetPort": LONE, "protocol": "UDP" },
                { "name": "shared", "port": SHARED_PORT, "targetPort": SHARED, "protocol": "TCP" },
            ],
        },
    }))?)
}

/// The target's endpoints, a slice for each family.
///
/// # Errors
///
/// When they are not what Kubernetes takes for slices.
pub(super) fn slices() -> anyhow::Result<Vec<EndpointSlice>> {
    let slice = |family: Family| {
        let endpoints = server_addresses(family).map(|address| {
            json!({
                "addresses": [address],
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": NODE,
            })
        });
        from_value(json!({
            "metadata": {
                "name": format!("{NAME}-{family}").to_lowercase(),
                "labels": { "kubernetes.io/service-name": NAME },
            },
            "addressType": if family == Family::V4 { "IPv4" } else { "IPv6" },
            "ports": [
                { "name": "lone", "port": LONE, "protocol": "TCP" },
                { "name": "datagrams", "port": LONE, "protocol": "UDP" },
                { "name": "shared", "port": SHARED, "protocol": "TCP" },
            ],
            "endpoints": endpoints,
        }))
    };
    Ok(Family::ALL.into_iter().map(slice).collect::<Result<_, _>>()?)
}

/// Writes manifests of so many Services, the target among them, into an empty directory.
///
/// # Errors
///
/// When they cannot be written.
pub(super) fn write_manifests(directory: &Path, services: u32) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    let mut file = List::new(directory.join("all.json").as_path())?;
    file.add(&node()?)?;
    file.add(&service()?)?;
    slices()?.iter().try_for_each(|slice| file.add(slice))?;
    for number in (1..services).map(Numbered) {
        file.add(&number.service()?)?;
        file.add(&number.slice(&number.endpoints())?)?;
    }
    file.end()
}

/// A `List` that is written while it grows.
struct List {
    file: BufWriter<File>,
    begun: bool,
}

impl List {
    fn new(path: &Path) -> anyhow::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        write!(file, r#"{{"apiVersion":"v1","kind":"List","items":["#)?;
        Ok(Self { file, begun: false })
    }

    fn add(&mut self, object: &impl Serialize) -> anyhow::Result<()> {
        if std::mem::replace(&mut self.begun, true) {
            self.file.write_all(b",\n")?;
        }
        Ok(to_writer(&mut self.file, object)?)
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.file.write_all(b"]}\n")?;
        Ok(self.file.flush()?)
    }
}
