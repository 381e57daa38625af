//! From a query to its answer, for the cluster's own names.
//!
//! In: [`Names`], the [`Zone`]'s settings and a [`Query`]. Out: a [`Resolution`]. Pure. The rules are those of the
//! Kubernetes DNS specification 1.1, and CoreDNS's where the specification has none.

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
    question::{Part, Query, Question},
};
use crate::model::{Family, ObjectName, ServicePort};

/// The longest chain of aliases that weir follows.
const MOST_ALIASES: usize = 8;

/// The settings of the cluster's zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Zone {
    /// The cluster's domain, in lower case.
    pub(crate) domain: Name,
    /// The TTL of answers, in seconds.
    pub(crate) ttl: u32,
    /// Whether pods have names made of their addresses.
    pub(crate) pods: bool,
    /// Whether `trafficDistribution` counts for headless Services.
    pub(crate) topology: bool,
}

/// The sections of a reply, and its flags.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) code: ResponseCode,
    /// AA: the records are the cluster's own.
    pub(crate) authoritative: bool,
    /// AD: the upstream has validated the records.
    pub(crate) authentic: bool,
    pub(crate) answers: Vec<Record>,
    /// The SOA, if there are no answers.
    pub(crate) authorities: Vec<Record>,
    /// Addresses of the targets in the answers.
    pub(crate) additionals: Vec<Record>,
}

impl Answer {
    /// A code without records, not authoritative.
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

/// The result of a query.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Resolution {
    Answer(Answer),
    /// Aliases that lead to a name outside the cluster, which weir has to forward.
    Alias(Vec<Record>, Name),
    /// The name is outside the cluster.
    Elsewhere,
}

/// The result of looking up one name.
enum Lookup {
    /// Answers of the query's type, and additional records. Without answers it is NODATA.
    Records(Vec<Record>, Vec<Record>),
    /// The name is an alias of another name.
    Alias(Name),
    /// NXDOMAIN.
    Nothing,
    /// The name is outside the cluster.
    Elsewhere,
}

/// Answers a query, and follows aliases within the cluster.
#[must_use]
pub(crate) fn answer(names: &Names, zone: &Zone, query: &Query<'_>) -> Resolution {
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
            Lookup::Elsewhere if aliases.is_empty() => return Resolution::Elsewhere,
            Lookup::Elsewhere => return Resolution::Alias(aliases, step.name.clone()),
            Lookup::Alias(next) => {
                aliases.push(record(step.name, zone.ttl, RData::CNAME(CNAME(next.clone()))));
                if query.kind == RecordType::CNAME || aliases.len() == MOST_ALIASES {
                    return Resolution::Answer(own(ResponseCode::NoError, aliases, Vec::new()));
                }
                target = Some(next);
            }
            Lookup::Records(records, additionals) => {
                let code = ResponseCode::NoError;
                // Also after an alias: the SOA tells clients for how long they may cache NODATA (RFC 2308).
                let authorities = if records.is_empty() { vec![soa(names, zone)] } else { Vec::new() };
                aliases.extend(records);
                return Resolution::Answer(Answer { additionals, ..own(code, aliases, authorities) });
            }
            Lookup::Nothing => {
                return Resolution::Answer(own(ResponseCode::NXDomain, aliases, vec![soa(names, zone)]));
            }
        }
    }
}

/// An authoritative answer.
fn own(code: ResponseCode, answers: Vec<Record>, authorities: Vec<Record>) -> Answer {
    Answer { authoritative: true, answers, authorities, ..Answer::without_records(code) }
}

fn find(names: &Names, zone: &Zone, query: &Query<'_>) -> Lookup {
    let exists = |there: bool| if there { none(query) } else { Lookup::Nothing };
    match Question::read(query.lower, &zone.domain) {
        Question::Elsewhere => Lookup::Elsewhere,
        Question::Nothing => Lookup::Nothing,
        Question::Domain => domain(names, zone, query),
        Question::Version => match query.kind {
            RecordType::TXT => version(query),
            _ => none(query),
        },
        Question::Server => addresses(query, zone, servers(names)),
        Question::Branch => exists(true),
        Question::Namespace(namespace) => exists(names.has_namespace(namespace)),
        Question::Pod(address) if zone.pods => addresses(query, zone, [address]),
        Question::Pod(_) => Lookup::Nothing,
        Question::Reverse(address) => reverse(names, zone, query, address),
        Question::Service { namespace, name, part } => {
            let Some(named) = names.get(&format!("{namespace}/{name}")) else { return Lookup::Nothing };
            match named.service() {
                Some(service) => self::service(names, zone, query, named, service, part),
                None => Lookup::Nothing,
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
) -> Lookup {
    match (&service.kind, part) {
        (NamedKind::Alias(target), Part::Whole) => match Name::from_utf8(format!("{target}.")) {
            Ok(target) => Lookup::Alias(target),
            Err(_) => Lookup::Nothing,
        },
        (NamedKind::Alias(_), _) => Lookup::Nothing,
        (NamedKind::Addresses(ips), Part::Whole) => cluster_ip(zone, query, ips, &service.ports, None),
        (NamedKind::Addresses(_), Part::Protocol(_)) => {
            let is_above_one = service.ports.iter().any(|port| part.selects(&port.name, port.protocol));
            if is_above_one { none(query) } else { Lookup::Nothing }
        }
        (NamedKind::Addresses(ips), Part::Port { .. }) => {
            let ports: Vec<ServicePort> = service
                .ports
                .iter()
                .filter(|port| part.selects(&port.name, port.protocol))
                .cloned()
                .collect();
            if ports.is_empty() { Lookup::Nothing } else { cluster_ip(zone, query, ips, &ports, Some(2)) }
        }
        (NamedKind::Endpoints, _) | (NamedKind::Addresses(_), Part::Endpoint(_)) => {
            let chosen = endpoints::choose(names, named, service, part, zone.topology, query);
            match part {
                _ if chosen.is_empty() => Lookup::Nothing,
                Part::Protocol(_) => none(query),
                _ => of_endpoints(zone, query, &chosen, part),
            }
        }
    }
}

/// Records of a Service with ClusterIPs. The query's name has `above` labels before the Service's own name.
fn cluster_ip(
    zone: &Zone,
    query: &Query<'_>,
    ips: &[IpAddr],
    ports: &[ServicePort],
    above: Option<usize>,
) -> Lookup {
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
    Lookup::Records(records, additionals)
}

/// Records of a headless Service, or of one endpoint of any Service.
fn of_endpoints(zone: &Zone, query: &Query<'_>, chosen: &[Chosen<'_>], part: Part<'_>) -> Lookup {
    if query.kind != RecordType::SRV {
        return addresses(query, zone, chosen.iter().map(|chosen| chosen.endpoint.address));
    }
    let (is_endpoint, above) = match part {
        Part::Whole => (false, 0),
        Part::Endpoint(_) => (true, 0),
        Part::Protocol(_) | Part::Port { .. } => (false, 2),
    };
    let service = own_name(query.name, above);
    let ports = chosen
        .iter()
        .flat_map(|chosen| chosen.ports().filter(|port| part.selects(&port.name, port.protocol)));
    let weight = weight(ports.count());
    let (mut records, mut additionals) = (Vec::new(), Vec::new());
    for chosen in chosen {
        let label = chosen.endpoint.label();
        let target = if is_endpoint { Ok(service.clone()) } else { service.prepend_label(label.as_str()) };
        let Ok(target) = target else { continue };
        for port in chosen.ports().filter(|port| part.selects(&port.name, port.protocol)) {
            let data = SRV::new(0, weight, port.port, target.clone());
            records.push(record(query.name, zone.ttl, RData::SRV(data)));
        }
        additionals.push(record(&target, zone.ttl, address(chosen.endpoint.address)));
    }
    unique(&mut records);
    if records.is_empty() {
        additionals.clear();
    }
    Lookup::Records(records, additionals)
}

/// Removes duplicate SRV records. An endpoint with an address of each family has one target, and so has a port with two
/// protocols.
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
    // A longer answer is truncated in any case, so duplicates do not matter there.
    seen.len() <= 64 && seen.contains(data)
}

/// The weight that CoreDNS gives each of `count` records.
fn weight(count: usize) -> u16 {
    u16::try_from(100 / count.max(1)).unwrap_or(1).max(1)
}

/// The name without its first labels.
fn own_name(name: &Name, above: usize) -> Name {
    let labels = usize::from(name.num_labels());
    name.trim_to(labels.saturating_sub(above))
}

fn reverse(names: &Names, zone: &Zone, query: &Query<'_>, address: IpAddr) -> Lookup {
    let owners = names.owners(address);
    let pointers = owners.iter().flat_map(|owner| pointers(names, zone, owner, address));
    let mut pointers: Vec<Name> = pointers.collect();
    pointers.dedup();
    match (pointers.is_empty(), query.kind) {
        (true, _) => Lookup::Elsewhere,
        (false, RecordType::PTR) => {
            let records =
                pointers.into_iter().map(|name| record(query.name, zone.ttl, RData::PTR(PTR(name))));
            Lookup::Records(records.collect(), Vec::new())
        }
        (false, _) => none(query),
    }
}

/// The names that one Service gives to an address.
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

fn domain(names: &Names, zone: &Zone, query: &Query<'_>) -> Lookup {
    match query.kind {
        RecordType::SOA => Lookup::Records(vec![soa(names, zone)], Vec::new()),
        RecordType::NS => {
            let Ok(server) = server(zone) else { return none(query) };
            let additionals = servers(names).map(|ip| record(&server, zone.ttl, address(ip)));
            let additionals = additionals.collect();
            let records = vec![record(query.name, zone.ttl, RData::NS(NS(server.clone())))];
            Lookup::Records(records, additionals)
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

/// Records of the addresses that match the query's type.
fn addresses(query: &Query<'_>, zone: &Zone, all: impl IntoIterator<Item = IpAddr>) -> Lookup {
    let family = match query.kind {
        RecordType::A => Family::V4,
        RecordType::AAAA => Family::V6,
        _ => return none(query),
    };
    let of_family = all.into_iter().filter(|ip| Family::of(*ip) == family);
    let records = of_family.map(|ip| record(query.name, zone.ttl, address(ip)));
    Lookup::Records(records.collect(), Vec::new())
}

/// NODATA: the name exists without records of the type. An ANY query gets an HINFO record instead (RFC 8482).
fn none(query: &Query<'_>) -> Lookup {
    if query.kind == RecordType::ANY {
        let data = RData::HINFO(HINFO::new("RFC8482".to_owned(), String::new()));
        return Lookup::Records(vec![record(query.name, 3600, data)], Vec::new());
    }
    Lookup::Records(Vec::new(), Vec::new())
}

/// The version record, with the TTL of the specification's example.
fn version(query: &Query<'_>) -> Lookup {
    let data = RData::TXT(TXT::new(vec!["1.1.0".to_owned()]));
    Lookup::Records(vec![record(query.name, 28_800, data)], Vec::new())
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

/// The zone's SOA. Its last field and its own TTL say how long clients may cache that a name does not exist.
fn soa(names: &Names, zone: &Zone) -> Record {
    let name = |label: &str| Name::from_ascii(label).and_then(|name| name.append_domain(&zone.domain));
    let server = name("ns.dns").unwrap_or_else(|_| zone.domain.clone());
    let mailbox = name("hostmaster").unwrap_or_else(|_| zone.domain.clone());
    let data = SOA::new(server, mailbox, names.changes(), 7200, 1800, 86400, zone.ttl);
    record(&zone.domain, zone.ttl, RData::SOA(data))
}
