//! The sequences to play: clients' calls on a few sockets, and changes of the Services meanwhile.
//!
//! In: chance. Out: [`Sequence`]s, which print as they are to be read in a report. Everything comes from few, so that calls
//! meet: two Services, three backends, up to three sockets.

use std::fmt;

use proptest::{collection::vec, prelude::*, sample::select};

/// How many Services there are.
pub(super) const SERVICES: usize = 2;
/// How many backends there are. Any of them may serve any Service.
pub(super) const BACKENDS: u8 = 3;
/// The most sockets of a sequence.
const SOCKETS: usize = 3;
/// The most calls of a sequence.
const CALLS: usize = 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Pod,
    Host,
}

/// The family of the sockets and of the Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    V4,
    V6,
    /// IPv6 sockets that speak IPv4.
    Mapped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

/// The option that lets sockets share a port. All sockets have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    ReusePort,
    ReuseAddress,
}

/// A Service as it is at first.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) present: bool,
    pub(super) endpoints: Vec<u8>,
    pub(super) sticky: bool,
}

/// The target of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    Service(usize),
    /// The Service by its NodePort, at the node's own address.
    NodePort(usize),
    /// A backend's own address, whether or not it serves anything.
    Backend(u8),
    /// A server that is no Service's.
    Elsewhere,
}

impl To {
    /// The Service that is asked, if one is.
    pub(super) const fn service(self) -> Option<usize> {
        match self {
            Self::Service(number) | Self::NodePort(number) => Some(number),
            Self::Backend(_) | Self::Elsewhere => None,
        }
    }
}

/// The address that a socket is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    Any,
    Own,
    /// A Service's address, which is not the client's.
    Service(usize),
    /// The port that all sockets may share, on any address or the own one.
    Shared {
        own: bool,
    },
}

/// One call on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Bind(At),
    Connect(To),
    /// `connect` to an address of the family AF_UNSPEC.
    Disconnect,
    /// `sendto`, or `send` where no address is given.
    Send(Option<To>),
    /// `recvfrom` where the sender's address is asked for, else `recv`.
    Receive {
        from: bool,
    },
    PeerName,
    OwnName,
    /// Another socket takes its place.
    Close,
}

/// A change of a Service or of its endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Joins(u8),
    /// This endpoint terminates, and still serves.
    Drains(u8),
    Leaves(u8),
    Goes,
    Comes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A call on the socket of this number.
    Call(usize, Act),
    /// Something happens to the Service of this number.
    Change(usize, Change),
}

#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) side: Side,
    pub(super) wire: Wire,
    pub(super) sharing: Sharing,
    pub(super) services: [Shape; SERVICES],
    pub(super) sockets: Vec<Transport>,
    pub(super) steps: Vec<Step>,
}

/// All sequences that may be played.
pub(super) fn sequences() -> impl Strategy<Value = Sequence> {
    let sockets = vec(prop_oneof![1 => Just(Transport::Tcp), 3 => Just(Transport::Udp)], 1..=SOCKETS);
    let setting = (
        select(vec![Side::Pod, Side::Host]),
        select(vec![Wire::V4, Wire::V6, Wire::Mapped]),
        select(vec![Sharing::ReusePort, Sharing::ReuseAddress]),
    );
    (setting, [shape(), shape()], sockets, vec(step(), 1..=CALLS)).prop_map(
        |((side, wire, sharing), services, sockets, mut steps)| {
            for step in &mut steps {
                if let Step::Call(socket, _) = step {
                    *socket %= sockets.len();
                }
            }
            Sequence { side, wire, sharing, services, sockets, steps }
        },
    )
}

fn shape() -> impl Strategy<Value = Shape> {
    let endpoints = prop_oneof![
        1 => Just(Vec::new()),
        1 => select(vec![vec![0], vec![1]]),
        4 => Just(vec![0, 1]),
        2 => Just(vec![0, 1, 2]),
    ];
    (prop::bool::weighted(0.9), endpoints, prop::bool::weighted(0.2))
        .prop_map(|(present, endpoints, sticky)| Shape { present, endpoints, sticky })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (0..SOCKETS, act()).prop_map(|(socket, act)| Step::Call(socket, act)),
        1 => (0..SERVICES, change()).prop_map(|(service, change)| Step::Change(service, change)),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let at = prop_oneof![
        1 => Just(At::Any),
        1 => Just(At::Own),
        1 => (0..SERVICES).prop_map(At::Service),
        4 => any::<bool>().prop_map(|own| At::Shared { own }),
    ];
    prop_oneof![
        3 => at.prop_map(Act::Bind),
        4 => to().prop_map(Act::Connect),
        2 => Just(Act::Disconnect),
        6 => to().prop_map(|to| Act::Send(Some(to))),
        4 => Just(Act::Send(None)),
        8 => prop::bool::weighted(0.8).prop_map(|from| Act::Receive { from }),
        2 => Just(Act::PeerName),
        1 => Just(Act::OwnName),
        1 => Just(Act::Close),
    ]
}

fn to() -> impl Strategy<Value = To> {
    prop_oneof![
        5 => Just(To::Service(0)),
        2 => Just(To::Service(1)),
        2 => (0..SERVICES).prop_map(To::NodePort),
        3 => (0..BACKENDS).prop_map(To::Backend),
        1 => Just(To::Elsewhere),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        2 => (0..BACKENDS).prop_map(Change::Joins),
        2 => (0..BACKENDS).prop_map(Change::Drains),
        4 => (0..BACKENDS).prop_map(Change::Leaves),
        1 => Just(Change::Goes),
        1 => Just(Change::Comes),
    ]
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?} client, {:?}, {:?}", self.side, self.wire, self.sharing)?;
        for (number, Shape { present, endpoints, sticky }) in self.services.iter().enumerate() {
            let (sticky, absent) =
                (if *sticky { ", sticky" } else { "" }, if *present { "" } else { ", not there yet" });
            writeln!(f, "Service {number}: endpoints {endpoints:?}{sticky}{absent}")?;
        }
        for (number, transport) in self.sockets.iter().enumerate() {
            writeln!(f, "socket {number}: {transport:?}")?;
        }
        self.steps.iter().zip(1..).try_for_each(|(step, number)| writeln!(f, "{number:3}. {step}"))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Change(service, change) => write!(f, "Service {service}: {change:?}"),
            Self::Call(socket, act) => {
                write!(f, "socket {socket}: ")?;
                match act {
                    Act::Bind(at) => write!(f, "bind({at:?})"),
                    Act::Connect(to) => write!(f, "connect({to:?})"),
                    Act::Disconnect => f.write_str("connect(AF_UNSPEC)"),
                    Act::Send(Some(to)) => write!(f, "sendto({to:?})"),
                    Act::Send(None) => f.write_str("send()"),
                    Act::Receive { from: true } => f.write_str("recvfrom()"),
                    Act::Receive { from: false } => f.write_str("recv()"),
                    Act::PeerName => f.write_str("getpeername()"),
                    Act::OwnName => f.write_str("getsockname()"),
                    Act::Close => f.write_str("close(), socket()"),
                }
            }
        }
    }
}
