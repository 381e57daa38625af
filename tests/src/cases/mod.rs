//! The packet cases: every rule of the behaviour reference that packets can show.
//!
//! In: nothing; this is a table. Out: [`Case`]s for [`crate::runner`], each with Services of its own, so that all of
//! them are loaded at once and run side by side. Every case runs over both families and over TCP, connected
//! and unconnected UDP by default, and passes on the real kube-proxy before weir must pass it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use weir::model::Family;

use crate::{
    node::{Location, node_address, second_node_address},
    objects::{Addresses, PORT, ServiceType, Shape, TARGET},
    runner::CaseRun,
    subject::Settings,
    traffic::Transport,
};

mod affinity;
mod conntrack;
mod differences;
mod endpoints;
mod live;
mod matrix;
mod ports;
mod refuse;
mod sockets;
mod window;

pub use differences::{Difference, at_socket};

#[derive(Clone, Debug)]
pub struct Case {
    /// The ids of the rules it shows.
    pub rules: &'static str,
    pub name: String,
    /// The name and addresses of its Service.
    pub addresses: Addresses,
    /// How the agents are to be set up.
    pub settings: Settings,
    /// The Service as the case finds it.
    pub shape: Shape,
    /// The families it runs over.
    pub families: Vec<Family>,
    /// The transports it runs over.
    pub transports: Vec<Transport>,
    /// In the order in which they happen.
    pub steps: Vec<Step>,
}

/// A step that is written out, run once for each family and transport.
pub type Act = fn(&CaseRun<'_>) -> anyhow::Result<()>;

/// One step of a case.
#[derive(Clone, Debug)]
pub enum Step {
    /// New flows get what they should.
    Check(Location, Target, Expect),
    /// The Service and its endpoints change to this.
    Become(Box<Shape>),
    /// The Service and its endpoints are deleted.
    Vanish,
    /// A flow is opened, for the steps below to ask on.
    Open(Location, Target),
    /// A flow is opened by sending to an address that no backend answers yet.
    Send(Location, Target),
    /// The backend that answered an open flow first answers it still.
    Stays,
    /// The open flows come to get no answers (K6, K7); those of the kube-proxy that proves the table stay.
    Ends,
    /// After some time a backend at this location answers the open flows.
    Moves(Location),
    /// Something of its own.
    Run(&'static str, Act),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    address: Address,
    port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Address {
    Cluster,
    UnusedCluster,
    External,
    Balancer,
    Node(u8),
    SecondNode(u8),
    Loopback,
}

const CLUSTER: Target = Target { address: Address::Cluster, port: PORT };
/// An address of the Service range that no Service has.
const UNUSED: Target = Target { address: Address::UnusedCluster, port: PORT };
const EXTERNAL: Target = Target { address: Address::External, port: PORT };
/// The address of the Service's load balancer.
const BALANCER: Target = Target { address: Address::Balancer, port: PORT };
/// The Service's NodePort on node 1.
const NODE_PORT: Target = Target { address: Address::Node(1), port: PORT };
/// Every destination that is not the ClusterIP.
const EXTERNALS: [Target; 3] = [NODE_PORT, EXTERNAL, BALANCER];

impl Target {
    /// Another port of the Service.
    const fn port(self, port: u16) -> Self {
        Self { address: self.address, port }
    }

    /// The socket address among those of a case. Addresses of nodes stand for NodePorts.
    #[must_use]
    pub fn resolve(self, addresses: Addresses, family: Family) -> SocketAddr {
        let loopback: IpAddr = match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        let (address, port) = match self.address {
            Address::Cluster => (addresses.cluster_ip(family), self.port),
            Address::UnusedCluster => (addresses.unused_cluster_ip(family), self.port),
            Address::External => (addresses.external_ip(family), self.port),
            Address::Balancer => (addresses.balancer_ip(family), self.port),
            Address::Node(node) => (node_address(family, node), addresses.node_port(self.port)),
            Address::SecondNode(node) => (second_node_address(family, node), addresses.node_port(self.port)),
            Address::Loopback => (loopback, addresses.node_port(self.port)),
        };
        SocketAddr::new(address, port)
    }

    /// Whether it is a ClusterIP, whatever the port.
    #[must_use]
    pub fn is_cluster_ip(self) -> bool {
        self.address == Address::Cluster
    }

    /// The node that translates calls from a location to this target.
    #[must_use]
    pub fn handled_by(self, from: Location) -> u8 {
        match (from, self.address) {
            (Location::Pod(node, _) | Location::Host(node), _) => node,
            (_, Address::Node(node) | Address::SecondNode(node)) => node,
            _ => 1,
        }
    }
}

/// The client's address that the server should see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Kept,
    /// An address of the node in between.
    Masqueraded,
    Any,
}

/// The result that new flows should get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Each of these answers now and then, and no other backend does.
    Served(Vec<(Location, u16)>, Source),
    /// Always the same one of these answers.
    OneOf(Vec<(Location, u16)>),
    Refused,
    Dropped,
    /// The first where there is this difference, and the second elsewhere.
    Unless(Difference, Box<Expect>, Box<Expect>),
}

impl Expect {
    /// Or `other` where there is a difference.
    fn unless(&self, difference: Difference, other: &Self) -> Self {
        Self::Unless(difference, Box::new(other.clone()), Box::new(self.clone()))
    }
}

use Source::{Kept, Masqueraded};

/// Answered by these places on the usual target port.
fn by(places: &[Location], source: Source) -> Expect {
    Expect::Served(places.iter().map(|&location| (location, TARGET)).collect(), source)
}

/// Answered by these places on the usual target port, whatever they see of the client.
fn any(places: &[Location]) -> Expect {
    by(places, Source::Any)
}

const POD11: Location = Location::Pod(1, 1);
const POD12: Location = Location::Pod(1, 2);
const POD21: Location = Location::Pod(2, 1);
const POD22: Location = Location::Pod(2, 2);
const HOST: Location = Location::Host(1);
const OUTSIDE: Location = Location::Outside(0);

/// A case that finds this Service.
fn case(rules: &'static str, name: impl Into<String>, shape: Shape) -> Case {
    Case {
        rules,
        name: name.into(),
        addresses: Addresses::new(0),
        settings: Settings::default(),
        shape,
        families: Family::ALL.to_vec(),
        transports: vec![Transport::Tcp, Transport::Udp, Transport::Datagram],
        steps: Vec::new(),
    }
}

impl Case {
    fn with(mut self, settings: &Settings) -> Self {
        self.settings = settings.clone();
        self
    }

    fn over(mut self, transports: &[Transport]) -> Self {
        self.transports = transports.to_vec();
        self
    }

    fn only(mut self, family: Family) -> Self {
        self.families = vec![family];
        self
    }

    fn step(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    fn check(self, from: Location, to: Target, expect: Expect) -> Self {
        self.step(Step::Check(from, to, expect))
    }

    fn checks(mut self, from: &[Location], to: &[Target], expect: &Expect) -> Self {
        for &from in from {
            for &to in to {
                self = self.check(from, to, expect.clone());
            }
        }
        self
    }

    fn then(self, shape: Shape) -> Self {
        self.step(Step::Become(Box::new(shape)))
    }
}

/// The whole table.
///
/// # Panics
///
/// With more cases than there are lots.
#[must_use]
pub fn all() -> Vec<Case> {
    let mut cases = matrix::cases();
    cases.extend(endpoints::cases());
    cases.extend(ports::cases());
    cases.extend(refuse::cases());
    cases.extend(affinity::cases());
    cases.extend(conntrack::cases());
    cases.extend(live::cases());
    cases.extend(sockets::cases());
    cases.extend(window::cases());
    for (number, case) in (1..).zip(&mut cases) {
        assert!(number <= Addresses::LAST, "too many cases for the addresses there are");
        case.addresses = Addresses::new(number);
    }
    cases
}
