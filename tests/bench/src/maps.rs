//! The eBPF plane by itself: what its maps take to fill and to change, and how much memory they are.
//!
//! In: numbers of Services. Out: [`Run`]s. No API server, no agent and no other plane: the plane is handed the deltas
//! that a planner would make of generated Services.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use weir::{
    dataplane::{
        Dataplane as _,
        ebpf::{Ebpf, Place},
    },
    model::{Family, ObjectName, PerFamily, Protocol},
    plan::{
        Backend, ClusterIpDelta, Delta, Destination, Frontend, FrontendPlan, NodePlan, NodePortAddresses,
        PortDelta, PortId, PortPlan, Removal, Route, Target, Treatment,
    },
};

use super::{cluster::ENDPOINTS, report::say, workload::Numbered};
use weir_tests::{bpffs::BpfFs, cgroup::Cgroup, netns::Namespace};

/// The property that all Services of a run share, which decides the content of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    Tcp,
    Sticky,
    Udp,
}

impl Shape {
    pub(super) const ALL: [Self; 3] = [Self::Tcp, Self::Sticky, Self::Udp];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Sticky => "TCP with session affinity",
            Self::Udp => "UDP",
        }
    }

    fn protocol(self) -> Protocol {
        match self {
            Self::Tcp | Self::Sticky => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
        }
    }
}

/// One filling of the maps.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub shape: Shape,
    pub services: u32,
    pub endpoints: u32,
    /// Opening the plane and filling empty maps, in seconds.
    pub filled_seconds: f64,
    /// CPU seconds of that: what it is on a machine with nothing else to do.
    pub filled_cpu_seconds: f64,
    /// Opening the plane again and finding everything there, in seconds.
    pub adopted_seconds: f64,
    /// CPU seconds of that.
    pub adopted_cpu_seconds: f64,
    /// One endpoint more or less of one Service, in seconds.
    pub changed_seconds: Vec<f64>,
    /// A Service more or less, in seconds.
    pub came_seconds: Vec<f64>,
    /// The maps, full.
    pub maps: Vec<Map>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Map {
    pub name: String,
    /// How many elements it has room for.
    pub room: u32,
    /// Bytes of kernel memory, all in all.
    pub bytes: u64,
}

/// Fills, adopts and changes so many Services of each shape, in turn.
pub(super) fn measure(services: u32, rounds: u32, changes: u32) -> Result<Vec<Run>> {
    let cgroup = Cgroup::new("maps")?;
    let node = Namespace::within(&cgroup, "maps")?;
    let mut runs = Vec::new();
    for _ in 0..rounds {
        for shape in Shape::ALL {
            let run = node.run(|| one(shape, services, changes, cgroup.path()))?;
            say(format_args!(
                "maps of {services} Services ({}): filled in {:.2} s, adopted in {:.2} s",
                shape.name(),
                run.filled_seconds,
                run.adopted_seconds
            ));
            runs.push(run);
        }
    }
    Ok(runs)
}

fn one(shape: Shape, services: u32, changes: u32, cgroup: &Path) -> Result<Run> {
    let files = BpfFs::new()?;
    let place = Place { bpf_root: files.directory("weir")?, cgroup_root: cgroup.to_owned() };
    let ports: Vec<_> = (0..services).map(|number| port(shape, number, ENDPOINTS)).collect();
    let all = complete(&ports);
    let open = || -> Result<(Ebpf, f64, f64)> {
        let (begin, cpu) = (Instant::now(), cpu_seconds()?);
        let mut plane = Ebpf::open(place.clone(), true)?;
        plane.apply(&all)?;
        Ok((plane, begin.elapsed().as_secs_f64(), cpu_seconds()? - cpu))
    };
    let (first, filled_seconds, filled_cpu_seconds) = open()?;
    drop(first);
    let (mut plane, adopted_seconds, adopted_cpu_seconds) = open()?;
    let changed_seconds = changed(&mut plane, shape, &ports, changes)?;
    let came_seconds = came(&mut plane, shape, services, changes)?;
    let maps = [maps(&place.services())?, maps(&place.sockets())?].concat();
    plane.remove()?;
    Ok(Run {
        shape,
        services,
        endpoints: ENDPOINTS,
        filled_seconds,
        filled_cpu_seconds,
        adopted_seconds,
        adopted_cpu_seconds,
        changed_seconds,
        came_seconds,
        maps,
    })
}

/// CPU time of this thread so far.
fn cpu_seconds() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

/// Takes an endpoint from Services here and there, and gives it back.
fn changed(plane: &mut Ebpf, shape: Shape, ports: &[Arc<PortPlan>], changes: u32) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    let services = u32::try_from(ports.len())?;
    for change in 0..changes {
        let number = change.wrapping_mul(7919) % services;
        let whole = &ports[number as usize];
        let less = port(shape, number, ENDPOINTS - 1);
        for (before, after) in [(whole, &less), (&less, whole)] {
            let ports = vec![PortDelta { before: Some(Arc::clone(before)), after: Some(Arc::clone(after)) }];
            seconds.push(applied(plane, ports, Vec::new())?);
        }
    }
    Ok(seconds)
}

/// Adds Services and takes each away again.
fn came(plane: &mut Ebpf, shape: Shape, services: u32, changes: u32) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    for number in services..services + changes {
        let (port, ip) = (port(shape, number, ENDPOINTS), IpAddr::from(*Numbered(number).cluster_ip().ip()));
        let comes = vec![PortDelta { before: None, after: Some(Arc::clone(&port)) }];
        seconds.push(applied(plane, comes, vec![ClusterIpDelta::Add(ip)])?);
        let goes = vec![PortDelta { before: Some(port), after: None }];
        seconds.push(applied(plane, goes, vec![ClusterIpDelta::Remove(ip)])?);
    }
    Ok(seconds)
}

fn applied(plane: &mut Ebpf, ports: Vec<PortDelta>, cluster_ips: Vec<ClusterIpDelta>) -> Result<f64> {
    let delta = Delta { node: None, cluster_ips, ports, complete: false };
    let begin = Instant::now();
    plane.apply(&delta)?;
    Ok(begin.elapsed().as_secs_f64())
}

fn complete(ports: &[Arc<PortPlan>]) -> Delta {
    let numbers = 0..u32::try_from(ports.len()).unwrap_or(u32::MAX);
    let ips = numbers.map(|number| ClusterIpDelta::Add((*Numbered(number).cluster_ip().ip()).into()));
    Delta {
        node: Some(Arc::new(NodePlan {
            local_traffic: PerFamily { v4: None, v6: None },
            node_port_addresses: PerFamily {
                v4: NodePortAddresses::AnyLocal,
                v6: NodePortAddresses::AnyLocal,
            },
            loopback_node_ports: PerFamily { v4: true, v6: true },
            host_addresses: Vec::new(),
            masquerade_mark: 0x4000,
            service_cidrs: Vec::new(),
            answers_names: false,
            name_clients: None,
            drops_out_of_window: true,
        })),
        cluster_ips: ips.collect(),
        ports: ports.iter().map(|port| PortDelta { before: None, after: Some(Arc::clone(port)) }).collect(),
        complete: true,
    }
}

/// The plan of a Service with a ClusterIP and this many of its endpoints.
fn port(shape: Shape, number: u32, endpoints: u32) -> Arc<PortPlan> {
    let service = Numbered(number);
    let backend = |at: std::net::SocketAddrV4| Backend {
        address: Ipv4Addr::into(*at.ip()),
        port: at.port(),
        local: false,
    };
    let cluster: Vec<_> = service.endpoints().into_iter().take(endpoints as usize).map(backend).collect();
    let (frontend, protocol) = (service.cluster_ip(), shape.protocol());
    Arc::new(PortPlan {
        id: PortId {
            service: ObjectName::new("default", &service.name()),
            port: "".into(),
            protocol,
            family: Family::V4,
        },
        cluster: cluster.clone(),
        local: Vec::new(),
        frontends: vec![FrontendPlan {
            frontend: Frontend {
                destination: Destination::Address((*frontend.ip()).into()),
                protocol,
                port: frontend.port(),
            },
            route: Route::uniform(Treatment { target: Target::Cluster, masquerade: false }),
            allowed_sources: None,
            answered_here: false,
        }],
        affinity: (shape == Shape::Sticky).then_some(10_800),
        on_removal: Removal::Keep,
        serving: if protocol == Protocol::Udp { cluster } else { Vec::new() },
    })
}

/// The memory of the pinned maps, as the kernel reports it for their descriptors (really used memory since Linux 6.4).
fn maps(directory: &Path) -> Result<Vec<Map>> {
    let mut maps = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let map = MapData::from_pin(&path)?;
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
        let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok());
        let bytes = bytes.with_context(|| format!("the kernel does not say how large {name} is"))?;
        maps.push(Map { name, room: map.info()?.max_entries(), bytes });
    }
    maps.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(maps)
}

impl Run {
    /// Kernel memory of some of the maps.
    pub(super) fn bytes(&self, names: &[&str]) -> f64 {
        let named = self.maps.iter().filter(|map| names.contains(&map.name.as_str()));
        named.map(|map| map.bytes).sum::<u64>() as f64
    }
}
