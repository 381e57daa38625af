//! The maps of a sockets' plane as they are in the kernel, numbers and all.
//!
//! In: where they are pinned. Out: [`Maps`], which can be compared byte by byte, or, as [`Group`]s, whatever the numbers
//! and slots that ports happen to have. Written out they are
//!
//! ```text
//! address 10.96.0.10 cluster-ip                                                an address by itself
//! frontend 10.96.0.10:80/TCP port=3 record=4 pod,host=slots:4..6(3.cluster) affinity=60 members
//! slot 4 10.244.0.2:8080                                                     of those that frontends lead to
//! member 3.cluster 10.244.0.2:8080                                           3 is the number of the port
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use proxy_ebpf::{
    Endpoint, FrontendKey, FrontendValue, Member, MemberKey, Record, Slots, flag, kind, set, verdict,
};
use weir::{dataplane::ebpf::Place, model::Protocol};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// Addresses by themselves, with their [`flag`]s.
    pub addresses: BTreeMap<FrontendKey, u32>,
    /// Where the other elements of `frontends` lead.
    pub frontends: BTreeMap<FrontendKey, Lead>,
    /// `slots`, those that frontends lead to.
    pub slots: BTreeMap<u32, Endpoint>,
    /// `members`.
    pub members: BTreeSet<MemberKey>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lead {
    /// The number of its port.
    pub port: u32,
    /// The record that this leads to.
    pub record: u32,
    /// The [`flag`]s of that.
    pub flags: u32,
    /// How long clients stay, in seconds.
    pub affinity: u32,
    /// For pods and for the host.
    pub choices: [Choice; 2],
}

/// Where one class of clients goes: one of [`verdict`], and where there are some, the slots and which of the port's sets
/// that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    verdict: u8,
    slots: Slots,
    kind: u32,
}

/// The content under one number, without the number, the record and the slots.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Each frontend with its flags, its affinity, and what pods and the host get.
    pub frontends: Vec<(FrontendKey, u32, u32, [Outcome; 2])>,
    /// Each member with the kind of its set.
    pub members: Vec<(u32, Endpoint)>,
}

/// A verdict, which of the port's sets, and the backends, sorted.
type Outcome = (u8, u32, Vec<Endpoint>);

impl Maps {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// When they are not there, or are not what they should be.
    pub fn read(place: &Place) -> Result<Self> {
        let directory = place.services();
        let ports: Array<_, u64> = Map::Array(pinned(&directory, "ports")?).try_into()?;
        let records: Array<_, Record> = Map::Array(pinned(&directory, "records")?).try_into()?;
        let slots: Array<_, Endpoint> = Map::Array(pinned(&directory, "slots")?).try_into()?;
        let mut maps = Self::default();
        for (key, value) in whole::<FrontendKey, FrontendValue>(&directory, "frontends")? {
            ensure!(value.is_of(&key), "{key:?} has the value of another");
            if key.kind == kind::ADDRESS {
                maps.addresses.insert(key, value.flags());
                continue;
            }
            let record = u32::try_from(ports.get(&value.port(), 0)?)?;
            let lead = Lead::of(value, record, &records.get(&record, 0)?);
            for Choice { slots: Slots { first, count }, .. } in lead.choices {
                for slot in first..first + count {
                    maps.slots.insert(slot, slots.get(&slot, 0)?);
                }
            }
            maps.frontends.insert(key, lead);
        }
        for (key, member) in whole::<MemberKey, Member>(&directory, "members")? {
            ensure!(member.is_of(&key), "{key:?} has the value of another");
            maps.members.insert(key);
        }
        Ok(maps)
    }

    /// The same by number, in an order that does not depend on it. Addresses by themselves are a group each.
    #[must_use]
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: BTreeMap<u32, Group> = BTreeMap::new();
        for (key, lead) in &self.frontends {
            let outcomes = lead.choices.map(|choice| self.outcome(&choice));
            let frontend = (*key, lead.flags, lead.affinity, outcomes);
            groups.entry(lead.port).or_default().frontends.push(frontend);
        }
        for member in &self.members {
            groups.entry(set::port(member.set)).or_default().members.push((member.set & 3, member.backend));
        }
        let address = |(key, flags): (&FrontendKey, &u32)| Group {
            frontends: vec![(*key, *flags, 0, Default::default())],
            members: Vec::new(),
        };
        let mut sorted: Vec<Group> = self.addresses.iter().map(address).collect();
        sorted.extend(groups.into_values());
        sorted.sort_unstable();
        sorted
    }

    fn outcome(&self, choice: &Choice) -> Outcome {
        let slots = choice.slots.first..choice.slots.first + choice.slots.count;
        let mut backends: Vec<Endpoint> = slots.filter_map(|slot| self.slots.get(&slot).copied()).collect();
        backends.sort_unstable();
        (choice.verdict, choice.kind, backends)
    }
}

impl Lead {
    fn of(value: FrontendValue, number: u32, record: &Record) -> Self {
        let column = record.columns[value.column() as usize];
        let choice = |verdict: u8| {
            let verdict = if value.is_for_packets() { verdict::PASS } else { verdict & !verdict::MASQUERADE };
            match verdict::set(verdict) {
                Some(kind) => Choice { verdict, slots: record.sets[kind as usize], kind },
                None => Choice { verdict, ..Choice::default() },
            }
        };
        let choices = [column.pod, column.host].map(choice);
        Self { port: value.port(), record: number, flags: record.flags, affinity: record.affinity, choices }
    }
}

impl fmt::Display for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut addresses: Vec<_> =
            self.addresses.iter().map(|(key, flags)| (key.endpoint().ip(), flags)).collect();
        addresses.sort_unstable();
        for (address, flags) in addresses {
            let known =
                [(flag::CLUSTER_IP, "cluster-ip"), (flag::NODE, "node"), (flag::LOOPBACK, "loopback")];
            let flags = known.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| name);
            let flags: String = flags.flat_map(|name| [" ", name]).collect();
            writeln!(f, "address {address}{flags}")?;
        }
        let mut frontends: Vec<_> = self.frontends.iter().collect();
        frontends.sort_unstable_by_key(|(key, _)| {
            (key.kind, key.endpoint().ip(), key.endpoint().port(), key.protocol)
        });
        for (key, lead) in frontends {
            let protocol = Protocol::ALL.into_iter().find(|known| known.number() == key.protocol);
            let protocol = protocol.map_or_else(|| "?".to_owned(), |protocol| protocol.to_string());
            let name = if key.kind == kind::NODE_PORT { "node-port" } else { "frontend" };
            write!(
                f,
                "{name} {}/{protocol} port={} record={}",
                address(&key.endpoint()),
                lead.port,
                lead.record
            )?;
            let [pod, host] = lead.choices.map(|choice| choice.text(lead.port));
            if pod == host {
                write!(f, " pod,host={pod}")?;
            } else {
                write!(f, " pod={pod} host={host}")?;
            }
            if lead.affinity != 0 {
                write!(f, " affinity={}", lead.affinity)?;
            }
            writeln!(f, "{}", if lead.flags & flag::MEMBERS == 0 { "" } else { " members" })?;
        }
        for (slot, backend) in &self.slots {
            writeln!(f, "slot {slot} {}", address(backend))?;
        }
        for member in &self.members {
            writeln!(f, "member {} {}", set_name(member.set), address(&member.backend))?;
        }
        Ok(())
    }
}

impl Choice {
    fn text(&self, port: u32) -> String {
        let Slots { first, count } = self.slots;
        match self.verdict {
            verdict::CLUSTER | verdict::LOCAL => {
                let set = set_name(set::number(port, self.kind));
                format!("slots:{first}..{}({set})", first + count)
            }
            verdict::REFUSE => "refuse".to_owned(),
            verdict::DROP => "drop".to_owned(),
            _ => "pass".to_owned(),
        }
    }
}

fn address(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.ip(), endpoint.port())
}

fn set_name(number: u32) -> String {
    let port = set::port(number);
    let kinds = [(set::CLUSTER, "cluster"), (set::LOCAL, "local"), (set::SERVING, "serving")];
    let kind = kinds.into_iter().find(|(kind, _)| set::number(port, *kind) == number);
    format!("{port}.{}", kind.map_or("?", |(_, name)| name))
}

fn pinned(directory: &Path, name: &str) -> Result<MapData> {
    MapData::from_pin(directory.join(name)).with_context(|| format!("opening the map {name}"))
}

fn whole<K: Pod + Ord, V: Pod>(directory: &Path, name: &str) -> Result<BTreeMap<K, V>> {
    let map: HashMap<_, K, V> = Map::HashMap(pinned(directory, name)?).try_into()?;
    let entries: Result<_, MapError> = map.iter().collect();
    entries.with_context(|| format!("reading the map {name}"))
}
