//! The flags of weir's DNS server.
//!
//! In: the arguments of a command line. Out: a [`DnsConfig`] if `--dns` is given, or a problem for each wrong
//! flag.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use clap::Args;
use ipnet::IpNet;

use super::Problem;
use crate::model::{DnsService, ObjectName, parse_address, parse_network};

/// Flags that have an effect only with `--dns`. A configuration file has no fields for them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "DNS")]
pub struct DnsArgs {
    /// Answer DNS queries for the cluster's names on this node, in front of the cluster's DNS Service
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          action = clap::ArgAction::Set, hide_possible_values = true, hide_default_value = true, value_name = "BOOL")]
    pub(super) dns: bool,
    /// DNS domain of the cluster
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    dns_domain: String,
    /// The cluster's DNS Service; weir answers at its ClusterIPs [default: kube-system/kube-dns, else
    /// openshift-dns/dns-default, else the oldest Service in kube-system with the label k8s-app=kube-dns]
    #[arg(long, value_name = "NAMESPACE/NAME")]
    dns_service: Option<String>,
    /// Link-local address of this node at which weir answers too
    #[arg(long, value_name = "IP", default_value = "169.254.20.53")]
    dns_address: String,
    /// Servers for all other names [default: the DNS Service's endpoints; without such a Service, the servers
    /// in /etc/resolv.conf]
    #[arg(long, value_name = "IP[:PORT],…", value_delimiter = ',')]
    dns_upstream: Vec<String>,
    /// Networks of further clients; this node and its pods are always answered. 0.0.0.0/0 and ::/0 allow
    /// every client
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    dns_clients: Vec<String>,
    /// Queries that one address may send in a second
    #[arg(long, value_name = "N", default_value = "20000")]
    dns_rate: NonZeroU32,
    /// TTL of answers, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = clap::value_parser!(u32).range(0..=3600))]
    dns_ttl: u32,
    /// Answer pod names made of an address, such as 10-244-0-5.default.pod.cluster.local
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true",
          action = clap::ArgAction::Set, hide_possible_values = true, value_name = "BOOL")]
    dns_pods: bool,
    /// Apply trafficDistribution to headless Services: answer only with near endpoints if there are any
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          action = clap::ArgAction::Set, hide_possible_values = true, value_name = "BOOL")]
    dns_topology: bool,
}

/// The settings of weir's DNS server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsConfig {
    /// The cluster's domain, in lower case, without the final dot.
    pub domain: String,
    /// The cluster's DNS Service.
    pub service: DnsService,
    /// The link-local address.
    pub address: IpAddr,
    /// The servers for other names. If empty: the endpoints of the DNS Service, or the servers in resolv.conf
    /// if there is no such Service.
    pub upstream: Vec<SocketAddr>,
    /// Networks of clients besides this node and its pods.
    pub clients: Vec<IpNet>,
    /// Queries that one address may send in a second.
    pub rate: NonZeroU32,
    /// TTL of answers, in seconds.
    pub ttl: u32,
    /// Whether pod names made of an address are answered.
    pub pods: bool,
    /// Whether `trafficDistribution` applies to headless Services.
    pub topology: bool,
}

impl DnsArgs {
    /// Checks the flags. `None` without `--dns`.
    pub(super) fn resolve(&self, problems: &mut Vec<Problem>) -> Option<DnsConfig> {
        let Self {
            dns,
            dns_domain,
            dns_service,
            dns_address,
            dns_upstream,
            dns_clients,
            dns_rate,
            dns_ttl,
            dns_pods,
            dns_topology,
        } = self;
        if !dns {
            return None;
        }
        let mut reject = |setting: &str, message: String| {
            problems.push(Problem { setting: setting.to_owned(), message });
        };
        let domain = dns_domain.trim_end_matches('.').to_ascii_lowercase();
        if domain.is_empty() || hickory_proto::rr::Name::from_ascii(format!("{domain}.")).is_err() {
            reject("--dns-domain", format!("`{dns_domain}` is not a domain such as cluster.local"));
        }
        let service = match dns_service.as_deref() {
            None => Some(DnsService::Detected),
            Some(text) => {
                let named = named_service(text);
                if named.is_none() {
                    reject("--dns-service", format!("`{text}` is not NAMESPACE/NAME"));
                }
                named
            }
        };
        let address = parse_address(dns_address).filter(is_link_local);
        if address.is_none() {
            reject("--dns-address", format!("`{dns_address}` is not in 169.254.0.0/16 or fc00::/7"));
        }
        let upstream = parse_each(dns_upstream, server, |text| {
            reject("--dns-upstream", format!("`{text}` is not an IP address with or without a port"));
        });
        let clients = parse_each(dns_clients, parse_network, |text| {
            reject("--dns-clients", format!("`{text}` is not a network such as 10.0.0.0/16"));
        });
        Some(DnsConfig {
            domain,
            service: service?,
            address: address?,
            upstream,
            clients,
            rate: *dns_rate,
            ttl: *dns_ttl,
            pods: *dns_pods,
            topology: *dns_topology,
        })
    }
}

/// fc00::/7 counts as link-local here, because addresses in fe80::/10 need a zone, which not every resolver's
/// configuration can express.
fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unique_local(),
    }
}

fn named_service(text: &str) -> Option<DnsService> {
    let (namespace, name) = text.split_once('/')?;
    let complete = !namespace.is_empty() && !name.is_empty();
    complete.then(|| DnsService::Named(ObjectName::new(namespace, name)))
}

/// Parses the elements of a list, and calls `reject` for each that cannot be parsed. Empty elements are
/// skipped.
fn parse_each<T>(
    given: &[String],
    parse: impl Fn(&str) -> Option<T>,
    mut reject: impl FnMut(&str),
) -> Vec<T> {
    let given = given.iter().map(|text| text.trim()).filter(|text| !text.is_empty());
    let parsed = given.filter_map(|text| {
        let value = parse(text);
        if value.is_none() {
            reject(text);
        }
        value
    });
    parsed.collect()
}

fn server(text: &str) -> Option<SocketAddr> {
    let with_port = text.parse().ok().filter(|server: &SocketAddr| server.port() != 0);
    with_port.or_else(|| Some(SocketAddr::new(parse_address(text)?, 53)))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        dns: DnsArgs,
    }

    fn read(line: &str) -> (Option<DnsConfig>, Vec<String>) {
        let line = Line::try_parse_from(std::iter::once("weir").chain(line.split_whitespace())).unwrap();
        let mut problems = Vec::new();
        let config = line.dns.resolve(&mut problems);
        (config, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn without_the_flag_there_is_no_dns() {
        assert_eq!(read(""), (None, vec![]));
        assert_eq!(read("--dns=false --dns-domain !!"), (None, vec![]));
    }

    #[test]
    fn every_setting_has_a_default() {
        let (config, problems) = read("--dns");
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(
            config.unwrap(),
            DnsConfig {
                domain: "cluster.local".to_owned(),
                service: DnsService::Detected,
                address: "169.254.20.53".parse().unwrap(),
                upstream: vec![],
                clients: vec![],
                rate: NonZeroU32::new(20_000).unwrap(),
                ttl: 5,
                pods: true,
                topology: false,
            }
        );
    }

    #[test]
    fn given_values_replace_the_defaults() {
        let (config, _) = read(
            "--dns --dns-domain Corp.Example. --dns-service dns/coredns --dns-upstream 192.0.2.1,[2001:db8::1]:5353 \
             --dns-clients 192.0.2.0/24 --dns-ttl 30 --dns-pods=false --dns-topology",
        );
        let config = config.unwrap();
        assert_eq!(
            (config.domain.as_str(), config.service.to_string().as_str()),
            ("corp.example", "dns/coredns")
        );
        let upstream: Vec<String> = config.upstream.iter().map(ToString::to_string).collect();
        assert_eq!(upstream, ["192.0.2.1:53", "[2001:db8::1]:5353"]);
        assert_eq!((config.ttl, config.pods, config.topology, config.clients.len()), (30, false, true, 1));
    }

    #[test]
    fn a_problem_names_each_wrong_flag() {
        let (_, problems) = read(
            "--dns --dns-domain a..b --dns-service dns --dns-address 192.0.2.1 --dns-upstream dns.example \
             --dns-clients 10.0.0.0",
        );
        insta::assert_snapshot!(problems.join("\n"), @r"
        --dns-domain: `a..b` is not a domain such as cluster.local
        --dns-service: `dns` is not NAMESPACE/NAME
        --dns-address: `192.0.2.1` is not in 169.254.0.0/16 or fc00::/7
        --dns-upstream: `dns.example` is not an IP address with or without a port
        --dns-clients: `10.0.0.0` is not a network such as 10.0.0.0/16
        ");
    }
}
