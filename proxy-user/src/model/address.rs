//! Addresses and networks as people write them in objects, made canonical (W9).
//!
//! In: text from an object. Out: an address or network in its one canonical form, or nothing.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

/// The address `text` means: leading zeros count as decimal and an IPv4-mapped IPv6 address is IPv4 (W9).
#[must_use]
pub fn parse_address(text: &str) -> Option<IpAddr> {
    written(text).map(|address| address.to_canonical())
}

/// The network `text` means, its host bits cleared; spaces around it and leading zeros are allowed (W9).
#[must_use]
pub fn parse_network(text: &str) -> Option<IpNet> {
    let (address, length) = text.trim().split_once('/')?;
    let decimal = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    let length = decimal.then(|| length.parse::<u8>().ok())??;
    Some(IpNet::new(written(address)?, length).ok()?.trunc())
}

fn written(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| decimal_octets(text)?.parse().ok())
}

/// `text` with its dotted IPv4 part, which may be the tail of an IPv6 address, stripped of leading zeros.
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
    fn w9_addresses_are_read_sloppily_and_made_canonical() {
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
    fn w9_networks_are_read_sloppily_and_made_canonical() {
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
