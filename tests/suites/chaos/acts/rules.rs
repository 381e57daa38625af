//! A foreign hand in the rule set: firewalls that load their own rules, operators, other programs.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weir_tests::node::Location;

use super::{Act, Held, nothing};
use crate::suites::chaos::{fixture::Fixture, random::Random};

pub(crate) const ACTS: &[Act] = &[
    Act::new("flush the rule set", |fixture, _| {
        nft(fixture, "flush ruleset")?;
        nothing()
    }),
    Act::new("flush the rule set again and again", |fixture, random| {
        for _ in 0..4 {
            nft(fixture, "flush ruleset")?;
            thread::sleep(random.time(Duration::from_millis(400)));
        }
        nft(fixture, "flush ruleset")?;
        nothing()
    }),
    Act::new("delete a table", |fixture, random| {
        let family = family(random);
        nft(fixture, &format!("delete table {family} weir"))?;
        nothing()
    }),
    Act::new("flush a table", |fixture, random| {
        let family = family(random);
        nft(fixture, &format!("flush table {family} weir"))?;
        nothing()
    }),
    Act::new("delete an element", delete_element),
    Act::new("empty a map or a set", |fixture, random| {
        let Some((kind, family, name)) = any_of(fixture, random, &["map", "set"])? else { return nothing() };
        nft(fixture, &format!("flush {kind} {family} weir {name}"))?;
        nothing()
    }),
    Act::new("delete a map or a set", |fixture, random| {
        let Some((kind, family, name)) = any_of(fixture, random, &["map", "set"])? else { return nothing() };
        // One that rules refer to cannot be deleted, which is the kernel's answer to the foreign hand.
        let _ = nft(fixture, &format!("delete {kind} {family} weir {name}"));
        nothing()
    }),
    Act::new("empty a chain", |fixture, random| {
        let Some((_, family, name)) = any_of(fixture, random, &["chain"])? else { return nothing() };
        nft(fixture, &format!("flush chain {family} weir {name}"))?;
        nothing()
    }),
    Act::new("delete a chain", |fixture, random| {
        let Some((_, family, name)) = any_of(fixture, random, &["chain"])? else { return nothing() };
        let _ = nft(fixture, &format!("delete chain {family} weir {name}"));
        nothing()
    }),
    Act::new("add a foreign set and a foreign chain", |fixture, random| {
        let family = family(random);
        let kind = if family == "ip" { "ipv4_addr" } else { "ipv6_addr" };
        nft(
            fixture,
            &format!("add set {family} weir foreign {{ type {kind}; }}; add chain {family} weir foreign"),
        )?;
        nothing()
    }),
    Act::new("flush during a start", |fixture, random| {
        fixture.kill_agent()?;
        nft(fixture, "flush ruleset")?;
        fixture.start_agent()?;
        thread::sleep(random.time(Duration::from_secs(2)));
        nft(fixture, "flush ruleset")?;
        nothing()
    }),
];

fn family(random: &mut Random) -> &'static str {
    if random.below(2) == 0 { "ip" } else { "ip6" }
}

fn nft(fixture: &Fixture, script: &str) -> Result<String> {
    fixture.topology.at(Location::Host(1)).stdout("nft", &[script])
}

fn listed(fixture: &Fixture, arguments: &[&str]) -> Result<Vec<Value>> {
    let text = fixture.topology.at(Location::Host(1)).stdout("nft", arguments)?;
    let listing: Value = serde_json::from_str(&text)?;
    Ok(listing["nftables"].as_array().cloned().unwrap_or_default())
}

/// Kind, family and name of one of the tables' objects; none where there is none of these kinds.
fn any_of(
    fixture: &Fixture,
    random: &mut Random,
    kinds: &[&str],
) -> Result<Option<(String, &'static str, String)>> {
    let family = family(random);
    let listing = listed(fixture, &["-t", "-j", "list", "table", family, "weir"])?;
    let names: Vec<(String, String)> = listing
        .iter()
        .flat_map(|entry| kinds.iter().map(move |kind| (*kind, entry[*kind]["name"].as_str())))
        .filter_map(|(kind, name)| Some((kind.to_owned(), name?.to_owned())))
        .collect();
    Ok(random.pick(&names).map(|(kind, name)| (kind.clone(), family, name.clone())))
}

fn delete_element(fixture: &mut Fixture, random: &mut Random) -> Result<Held> {
    // One that has elements is among a few; if none is, there is nothing to delete.
    for _ in 0..10 {
        let Some((kind, family, name)) = any_of(fixture, random, &["map", "set"])? else { continue };
        let listing = listed(fixture, &["-j", "list", &kind, family, "weir", &name])?;
        let entry = listing.iter().find_map(|entry| entry.get(&kind)).context("nft lists nothing")?;
        let elements = entry["elem"].as_array().cloned().unwrap_or_default();
        let Some(element) = random.pick(&elements).map(named) else { continue };
        let deletion = json!({ "nftables": [{ "delete": { "element": {
            "family": family, "table": "weir", "name": name, "elem": [element],
        } } }] });
        fixture.topology.at(Location::Host(1)).stdout("nft", &["-j", &deletion.to_string()])?;
        break;
    }
    nothing()
}

/// The identity of an element: without its timeout and its counter.
fn named(element: &Value) -> Value {
    let key = |key: &Value| key.pointer("/elem/val").unwrap_or(key).clone();
    match element.as_array().map(Vec::as_slice) {
        Some([first, value]) => json!([key(first), value]),
        _ => key(element),
    }
}
