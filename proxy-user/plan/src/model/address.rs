//! Parses addresses and networks of Kubernetes objects into their canonical form (W9).
//!
//! In: text from an object. Out: an address or network, or `None`.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

/// Parses an address. Leading zeros are decimal, and an IPv4-mapped IPv6 address becomes IPv4 (W9).
#[must_use]
pub fn parse_address(text: &str) -> Option<IpAddr> {
    parse_lenient(text).map(|address| address.to_canonical())
}

/// Parses a network and clears its host bits. Blanks around it and leading zeros are allowed (W9).
#[must_use]
pub fn parse_network(text: &str) -> Option<IpNet> {
    let (address, length) = text.trim().split_once('/')?;
    let decimal = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    let length = decimal.then(|| length.parse::<u8>().ok())??;
    Some(IpNet::new(parse_lenient(address)?, length).ok()?.trunc())
}

/// The reason if no Service can have this address. Such an address is in use on every machine, and weir would
/// take it away from all processes there.
#[must_use]
pub fn unusable(address: IpAddr) -> Option<&'static str> {
    let (unspecified, loopback, multicast, link_local) = match address {
        IpAddr::V4(ip) => (ip.octets()[0] == 0, ip.is_loopback(), ip.is_multicast(), ip.is_link_local()),
        IpAddr::V6(ip) => {
            (ip.is_unspecified(), ip.is_loopback(), ip.is_multicast(), ip.is_unicast_link_local())
        }
    };
    let reasons = [
        (unspecified, "an address of this network, which no Service can have"),
        (loopback, "a loopback address, which no Service can have"),
        (multicast, "a multicast address, which no Service can have"),
        (link_local, "a link-local address, which no Service can have"),
        (address == Ipv4Addr::BROADCAST, "the broadcast address, which no Service can have"),
    ];
    reasons.into_iter().find_map(|(holds, reason)| holds.then_some(reason))
}

fn parse_lenient(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| decimal_octets(text)?.parse().ok())
}

/// `text` without leading zeros in its dotted IPv4 part, which may be the tail of an IPv6 address.
fn decimal_octets(text: &str) -> Option<Cow<'_, str>> {
    let (head, tail) = text.rsplit_once(':').map_or(("", text), |(head, tail)| (&text[..=head.len()], tail));
    let mut octets = tail.split('.').map(octet);
    let address = Ipv4Addr::new(octets.next()??, octets.next()??, octets.next()??, octets.next()??);
    octets.next().is_none().then(|| Cow::Owned(format!("{head}{address}")))
}

fn octet(text: &str) -> Option<u8> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w9_lenient_addresses_become_canonical() {
        for (written, meant) in [
            ("172.30.0.41", Some("172.30.0.41")),
            ("172.30.0.041", Some("172.30.0.41")),
            ("010.000.0.1", Some("10.0.0.1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("::ffff:10.0.0.01", Some("10.0.0.1")),
            ("2001:DB8:0:0::1", Some("2001:db8::1")),
            ("1.2.3", None),
            ("1.2.3.4.5", None),
            ("1.2.3.256", None),
            ("1.2.3.+4", None),
            ("1.2.3.", None),
            ("", None),
            ("example.org", None),
        ] {
            assert_eq!(parse_address(written), meant.map(|meant| meant.parse().unwrap()), "{written}");
        }
    }

    #[test]
    fn addresses_in_use_on_every_machine_are_unusable() {
        for bad in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.0.9",
            "169.254.169.254",
            "224.0.0.1",
            "239.255.255.255",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "febf::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
        ] {
            assert!(unusable(parse_address(bad).unwrap()).is_some(), "{bad}");
        }
        for good in [
            "1.0.0.1",
            "10.0.0.1",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.0.1",
            "192.0.2.1",
            "223.255.255.255",
            "240.0.0.1",
            "255.255.255.254",
            "::2",
            "2001:db8::1",
            "fd00::1",
            "fec0::1",
            "64:ff9b::1",
            "::ffff:10.0.0.1",
        ] {
            assert_eq!(unusable(parse_address(good).unwrap()), None, "{good}");
        }
    }

    #[test]
    fn w9_lenient_networks_become_canonical() {
        for (written, meant) in [
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            ("203.0.113.000/025", Some("203.0.113.0/25")),
            (" 192.0.2.77/24 ", Some("192.0.2.0/24")),
            ("2001:db8::1/32", Some("2001:db8::/32")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("10.0.0.0", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/", None),
        ] {
            assert_eq!(parse_network(written), meant.map(|meant| meant.parse().unwrap()), "{written}");
        }
    }
}
