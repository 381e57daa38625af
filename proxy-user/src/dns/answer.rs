//! From a query to its answer, as far as the cluster's own names go.
//!
//! In: [`Names`], the [`Zone`]'s settings, a query and a number to rotate by. Out: a [`Resolution`]. Pure: the same in
//! is the same out. Rules are those of the Kubernetes DNS specification 1.1; where that is silent, CoreDNS's.

use std::net::IpAddr;

use hickory_proto::{
    op::ResponseCode,
    rr::{
        Name, RData, Record, RecordType,
        rdata::{CNAME, HINFO, NS, PTR, SOA, SRV, TXT},
    },
};

use super::names::{Named, NamedKind, NamedService, Names};
use super::{
    endpoints::{self, Chosen},
    question::{Part, Question},
};
use crate::model::{Family, ObjectName, Protocol, ServicePort};

/// How many aliases of aliases are followed.
const MOST_ALIASES: usize = 8;

/// What a zone's answers depend on besides the names in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    /// The cluster's domain, in lower case.
    pub domain: Name,
    /// How long answers may be kept, in seconds.
    pub ttl: u32,
    /// Whether pods have names made of their addresses.
    pub pods: bool,
    /// Whether `trafficDistribution` counts for headless Services.
    pub topology: bool,
}

/// What is asked, and in what spirit.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The name, in the case it was asked in.
    pub name: &'a Name,
    /// The same in lower case.
    pub lower: &'a Name,
    /// The type.
    pub kind: RecordType,
    /// Which endpoint comes first, in turn.
    pub rotation: u32,
    /// More records than these would be cut off.
    pub most: usize,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The response code.
    pub code: ResponseCode,
    /// Whether it comes from the zone itself.
    pub authoritative: bool,
    /// Whether the server that it comes from has validated it.
    pub authentic: bool,
    /// The answers.
    pub answers: Vec<Record>,
    /// Why there is none: the zone's SOA.
    pub authorities: Vec<Record>,
    /// What the asker would ask next.
    pub additionals: Vec<Record>,
}

impl Answer {
    /// Only a code, in nobody's name.
    pub(super) fn without_records(code: ResponseCode) -> Self {
        Self {
            code,
            authoritative: false,
            authentic: false,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
        }
    }
}

/// What becomes of a query.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// This is the answer.
    Answer(Answer),
    /// These aliases lead out of the cluster, to this name: the upstream has to be asked for it.
    Alias(Vec<Record>, Name),
    /// The name is none of ours.
    Elsewhere,
}

/// What is at a name.
enum Found {
    /// These records, of whatever type was asked for; none is NODATA.
    Records(Vec<Record>, Vec<Record>),
    /// Another name.
    Alias(Name),
    /// Nothing: NXDOMAIN.
    Nothing,
    /// The name is none of ours.
    Elsewhere,
}

/// Answers a query.
#[must_use]
pub fn answer(names: &Names, zone: &Zone, query: &Query<'_>) -> Resolution {
    let mut aliases: Vec<Record> = Vec::new();
    let mut target: Option<Name> = None;
    loop {
        let lower = target.as_ref().map(Name::to_lowercase);
        let step = Query {
            name: target.as_ref().unwrap_or(query.name),
            lower: lower.as_ref().unwrap_or(query.lower),
            ..*query
        };
        match find(names, zone, &step) {
            Found::Elsewhere if aliases.is_empty() => return Resolution::Elsewhere,
            Found::Elsewhere => return Resolution::Alias(aliases, step.name.clone()),
            Found::Alias(next) => {
                aliases.push(record(step.name, zone.ttl, RData::CNAME(CNAME(next.clone()))));
                if query.kind == RecordType::CNAME || aliases.len() == MOST_ALIASES {
                    return Resolution::Answer(own(ResponseCode::NoError, aliases, Vec::new()));
                }
                target = Some(next);
            }
            Found::Records(records, additionals) => {
                let code = ResponseCode::NoError;
                // Behind an alias too, it says that there is nothing and for how long (RFC 2308).
                let authorities = if records.is_empty() { vec![soa(names, zone)] } else { Vec::new() };
                aliases.extend(records);
                return Resolution::Answer(Answer { additionals, ..own(code, aliases, authorities) });
            }
            Found::Nothing => {
                return Resolution::Answer(own(ResponseCode::NXDomain, aliases, vec![soa(names, zone)]));
            }
        }
    }
}

/// An answer from the zone itself.
fn own(code: ResponseCode, answers: Vec<Record>, authorities: Vec<Record>) -> Answer {
    Answer { authoritative: true, answers, authorities, ..Answer::without_records(code) }
}

fn find(names: &Names, zone: &Zone, query: &Query<'_>) -> Found {
    let exists = |there: bool| if there { none(query) } else { Found::Nothing };
    match Question::read(query.lower, &zone.domain) {
        Question::Elsewhere => Found::Elsewhere,
        Question::Nothing => Found::Nothing,
        Question::Domain => domain(names, zone, query),
        Question::Version => match query.kind {
            RecordType::TXT => version(query),
            _ => none(query),
        },
        Question::Server => addresses(query, zone, servers(names)),
        Question::Branch => exists(true),
        Question::Namespace(namespace) => exists(names.has_namespace(namespace)),
        Question::Pod(address) if zone.pods => addresses(query, zone, [address]),
        Question::Pod(_) => Found::Nothing,
        Question::Reverse(address) => reverse(names, zone, query, address),
        Question::Service { namespace, name, part } => {
            let Some(named) = names.get(&format!("{namespace}/{name}")) else { return Found::Nothing };
            match named.service() {
                Some(service) => self::service(names, zone, query, named, service, part),
                None => Found::Nothing,
            }
        }
    }
}

fn service(
    names: &Names,
    zone: &Zone,
    query: &Query<'_>,
    named: &Named,
    service: &NamedService,
    part: Part<'_>,
) -> Found {
    match (&service.kind, part) {
        (NamedKind::Alias(target), Part::Whole) => match Name::from_utf8(format!("{target}.")) {
            Ok(target) => Found::Alias(target),
            Err(_) => Found::Nothing,
        },
        (NamedKind::Alias(_), _) => Found::Nothing,
        (NamedKind::Addresses(ips), Part::Whole) => cluster_ip(zone, query, ips, &service.ports, None),
        (NamedKind::Addresses(_), Part::Protocol(_)) => {
            let is_above_one = service.ports.iter().any(|port| is(part, &port.name, port.protocol));
            if is_above_one { none(query) } else { Found::Nothing }
        }
        (NamedKind::Addresses(ips), Part::Port { .. }) => {
            let ports: Vec<ServicePort> =
                service.ports.iter().filter(|port| is(part, &port.name, port.protocol)).cloned().collect();
            if ports.is_empty() { Found::Nothing } else { cluster_ip(zone, query, ips, &ports, Some(2)) }
        }
        (NamedKind::Endpoints, _) | (NamedKind::Addresses(_), Part::Endpoint(_)) => {
            let chosen = endpoints::choose(names, named, service, part, zone.topology, query);
            match part {
                _ if chosen.is_empty() => Found::Nothing,
                Part::Protocol(_) => none(query),
                _ => of_endpoints(zone, query, &chosen, part),
            }
        }
    }
}

/// Whether a port is the one asked for.
pub(super) fn is(part: Part<'_>, name: &str, protocol: Protocol) -> bool {
    match part {
        Part::Port { name: wanted, protocol: of } => {
            name.eq_ignore_ascii_case(wanted) && protocol.to_string().eq_ignore_ascii_case(of)
        }
        // A port without a name has none below its protocol's.
        Part::Protocol(of) => !name.is_empty() && protocol.to_string().eq_ignore_ascii_case(of),
        Part::Whole | Part::Endpoint(_) => true,
    }
}

/// A Service with ClusterIPs. `above` labels of the name stand above the Service's own.
fn cluster_ip(
    zone: &Zone,
    query: &Query<'_>,
    ips: &[IpAddr],
    ports: &[ServicePort],
    above: Option<usize>,
) -> Found {
    if query.kind != RecordType::SRV {
        return addresses(query, zone, ips.iter().copied());
    }
    let target = own_name(query.name, above.unwrap_or(0));
    let weight = weight(ports.len() * ips.len());
    let records = ports
        .iter()
        .map(|port| record(query.name, zone.ttl, RData::SRV(SRV::new(0, weight, port.port, target.clone()))));
    let additionals = ips.iter().map(|ip| record(&target, zone.ttl, address(*ip)));
    let mut records: Vec<Record> = records.collect();
    unique(&mut records);
    let additionals = if records.is_empty() { Vec::new() } else { additionals.collect() };
    Found::Records(records, additionals)
}

/// The endpoints of a headless Service, or one endpoint of any.
fn of_endpoints(zone: &Zone, query: &Query<'_>, chosen: &[Chosen<'_>], part: Part<'_>) -> Found {
    if query.kind != RecordType::SRV {
        return addresses(query, zone, chosen.iter().map(|chosen| chosen.endpoint.address));
    }
    let (is_endpoint, above) = match part {
        Part::Whole => (false, 0),
        Part::Endpoint(_) => (true, 0),
        Part::Protocol(_) | Part::Port { .. } => (false, 2),
    };
    let service = own_name(query.name, above);
    let ports =
        chosen.iter().flat_map(|chosen| chosen.ports().filter(|port| is(part, &port.name, port.protocol)));
    let weight = weight(ports.count());
    let (mut records, mut additionals) = (Vec::new(), Vec::new());
    for chosen in chosen {
        let label = chosen.endpoint.label();
        let target = if is_endpoint { Ok(service.clone()) } else { service.prepend_label(label.as_str()) };
        let Ok(target) = target else { continue };
        for port in chosen.ports().filter(|port| is(part, &port.name, port.protocol)) {
            let data = SRV::new(0, weight, port.port, target.clone());
            records.push(record(query.name, zone.ttl, RData::SRV(data)));
        }
        additionals.push(record(&target, zone.ttl, address(chosen.endpoint.address)));
    }
    unique(&mut records);
    if records.is_empty() {
        additionals.clear();
    }
    Found::Records(records, additionals)
}

/// An endpoint with an address of each family is two endpoints, and one target; so are two protocols on one port.
fn unique(records: &mut Vec<Record>) {
    let mut seen: Vec<SRV> = Vec::new();
    records.retain(|record| match &record.data {
        RData::SRV(data) if records_has(&seen, data) => false,
        RData::SRV(data) => {
            seen.push(data.clone());
            true
        }
        _ => true,
    });
}

fn records_has(seen: &[SRV], data: &SRV) -> bool {
    // Only neighbours in a small answer can be the same; a large one is cut off anyway.
    seen.len() <= 64 && seen.contains(data)
}

/// What CoreDNS gives each of so many.
fn weight(count: usize) -> u16 {
    u16::try_from(100 / count.max(1)).unwrap_or(1).max(1)
}

/// The name without its first labels.
fn own_name(name: &Name, above: usize) -> Name {
    let labels = usize::from(name.num_labels());
    name.trim_to(labels.saturating_sub(above))
}

fn reverse(names: &Names, zone: &Zone, query: &Query<'_>, address: IpAddr) -> Found {
    let owners = names.owners(address);
    let pointers = owners.iter().flat_map(|owner| pointers(names, zone, owner, address));
    let mut pointers: Vec<Name> = pointers.collect();
    pointers.dedup();
    match (pointers.is_empty(), query.kind) {
        (true, _) => Found::Elsewhere,
        (false, RecordType::PTR) => {
            let records =
                pointers.into_iter().map(|name| record(query.name, zone.ttl, RData::PTR(PTR(name))));
            Found::Records(records.collect(), Vec::new())
        }
        (false, _) => none(query),
    }
}

/// The names that a Service gives an address.
fn pointers(names: &Names, zone: &Zone, owner: &ObjectName, address: IpAddr) -> Vec<Name> {
    let Some((named, service)) =
        names.get(&owner.to_string()).and_then(|named| Some((named, named.service()?)))
    else {
        return Vec::new();
    };
    let own = format!("{}.{}.svc", owner.name(), owner.namespace());
    let name = |text: String| Name::from_ascii(text).and_then(|name| name.append_domain(&zone.domain)).ok();
    match &service.kind {
        NamedKind::Addresses(_) => name(own).into_iter().collect(),
        NamedKind::Endpoints => {
            let endpoints = named.slices().flat_map(|slice| &slice.endpoints);
            let endpoints = endpoints.filter(|endpoint| {
                endpoint.address == address && (endpoint.ready || service.publish_not_ready)
            });
            endpoints.filter_map(|endpoint| name(format!("{}.{own}", endpoint.label()))).collect()
        }
        NamedKind::Alias(_) => Vec::new(),
    }
}

fn domain(names: &Names, zone: &Zone, query: &Query<'_>) -> Found {
    match query.kind {
        RecordType::SOA => Found::Records(vec![soa(names, zone)], Vec::new()),
        RecordType::NS => {
            let Ok(server) = server(zone) else { return none(query) };
            let additionals = servers(names).map(|ip| record(&server, zone.ttl, address(ip)));
            let additionals = additionals.collect();
            let records = vec![record(query.name, zone.ttl, RData::NS(NS(server.clone())))];
            Found::Records(records, additionals)
        }
        _ => none(query),
    }
}

fn server(zone: &Zone) -> Result<Name, hickory_proto::ProtoError> {
    Name::from_ascii("ns.dns")?.append_domain(&zone.domain)
}

/// The addresses of the cluster's DNS Service.
fn servers(names: &Names) -> impl Iterator<Item = IpAddr> + '_ {
    names.dns_addresses().unwrap_or_default().iter().copied()
}

/// Those of the addresses that are of the type asked for.
fn addresses(query: &Query<'_>, zone: &Zone, all: impl IntoIterator<Item = IpAddr>) -> Found {
    let family = match query.kind {
        RecordType::A => Family::V4,
        RecordType::AAAA => Family::V6,
        _ => return none(query),
    };
    let of_family = all.into_iter().filter(|ip| Family::of(*ip) == family);
    let records = of_family.map(|ip| record(query.name, zone.ttl, address(ip)));
    Found::Records(records.collect(), Vec::new())
}

/// The name is there and has nothing of the type; whoever asks for anything is told so (RFC 8482).
fn none(query: &Query<'_>) -> Found {
    if query.kind == RecordType::ANY {
        let data = RData::HINFO(HINFO::new("RFC8482".to_owned(), String::new()));
        return Found::Records(vec![record(query.name, 3600, data)], Vec::new());
    }
    Found::Records(Vec::new(), Vec::new())
}

/// With the TTL of the specification's example.
fn version(query: &Query<'_>) -> Found {
    let data = RData::TXT(TXT::new(vec!["1.1.0".to_owned()]));
    Found::Records(vec![record(query.name, 28_800, data)], Vec::new())
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(ip.into()),
        IpAddr::V6(ip) => RData::AAAA(ip.into()),
    }
}

pub(super) fn record(name: &Name, ttl: u32, data: RData) -> Record {
    Record::from_rdata(name.clone(), ttl, data)
}

/// The zone's SOA; how long nothing may be remembered is its last field and its own TTL.
fn soa(names: &Names, zone: &Zone) -> Record {
    let name = |label: &str| Name::from_ascii(label).and_then(|name| name.append_domain(&zone.domain));
    let server = name("ns.dns").unwrap_or_else(|_| zone.domain.clone());
    let mailbox = name("hostmaster").unwrap_or_else(|_| zone.domain.clone());
    let data = SOA::new(server, mailbox, names.changes(), 7200, 1800, 86400, zone.ttl);
    record(&zone.domain, zone.ttl, RData::SOA(data))
}
