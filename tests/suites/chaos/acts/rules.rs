//! A foreign hand in the rule set: firewalls that load their own rules, operators, other programs.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weir_tests::node::Place;

use super::{Act, Held, nothing};
use crate::suites::chaos::{random::Random, rig::Rig};

pub(crate) const ACTS: &[Act] = &[
    Act::new("flush the rule set", |rig, _| {
        nft(rig, "flush ruleset")?;
        nothing()
    }),
    Act::new("flush the rule set again and again", |rig, random| {
        for _ in 0..4 {
            nft(rig, "flush ruleset")?;
            thread::sleep(random.time(Duration::from_millis(400)));
        }
        nft(rig, "flush ruleset")?;
        nothing()
    }),
    Act::new("delete a table", |rig, random| {
        let family = family(random);
        nft(rig, &format!("delete table {family} weir"))?;
        nothing()
    }),
    Act::new("flush a table", |rig, random| {
        let family = family(random);
        nft(rig, &format!("flush table {family} weir"))?;
        nothing()
    }),
    Act::new("delete an element", delete_element),
    Act::new("empty a map or a set", |rig, random| {
        let Some((kind, family, name)) = any_of(rig, random, &["map", "set"])? else { return nothing() };
        nft(rig, &format!("flush {kind} {family} weir {name}"))?;
        nothing()
    }),
    Act::new("delete a map or a set", |rig, random| {
        let Some((kind, family, name)) = any_of(rig, random, &["map", "set"])? else { return nothing() };
        // One that rules refer to cannot be deleted, which is the kernel's answer to the foreign hand.
        let _ = nft(rig, &format!("delete {kind} {family} weir {name}"));
        nothing()
    }),
    Act::new("empty a chain", |rig, random| {
        let Some((_, family, name)) = any_of(rig, random, &["chain"])? else { return nothing() };
        nft(rig, &format!("flush chain {family} weir {name}"))?;
        nothing()
    }),
    Act::new("delete a chain", |rig, random| {
        let Some((_, family, name)) = any_of(rig, random, &["chain"])? else { return nothing() };
        let _ = nft(rig, &format!("delete chain {family} weir {name}"));
        nothing()
    }),
    Act::new("add a foreign set and a foreign chain", |rig, random| {
        let family = family(random);
        let kind = if family == "ip" { "ipv4_addr" } else { "ipv6_addr" };
        nft(
            rig,
            &format!("add set {family} weir foreign {{ type {kind}; }}; add chain {family} weir foreign"),
        )?;
        nothing()
    }),
    Act::new("flush during a start", |rig, random| {
        rig.kill_agent()?;
        nft(rig, "flush ruleset")?;
        rig.start_agent()?;
        thread::sleep(random.time(Duration::from_secs(2)));
        nft(rig, "flush ruleset")?;
        nothing()
    }),
];

fn family(random: &mut Random) -> &'static str {
    if random.below(2) == 0 { "ip" } else { "ip6" }
}

fn nft(rig: &Rig, script: &str) -> Result<String> {
    rig.topology.at(Place::Host(1)).stdout("nft", &[script])
}

fn listed(rig: &Rig, arguments: &[&str]) -> Result<Vec<Value>> {
    let text = rig.topology.at(Place::Host(1)).stdout("nft", arguments)?;
    let listing: Value = serde_json::from_str(&text)?;
    Ok(listing["nftables"].as_array().cloned().unwrap_or_default())
}

/// Kind, family and name of one of the tables' objects; none where there is none of these kinds.
fn any_of(rig: &Rig, random: &mut Random, kinds: &[&str]) -> Result<Option<(String, &'static str, String)>> {
    let family = family(random);
    let listing = listed(rig, &["-t", "-j", "list", "table", family, "weir"])?;
    let names: Vec<(String, String)> = listing
        .iter()
        .flat_map(|entry| kinds.iter().map(move |kind| (*kind, entry[*kind]["name"].as_str())))
        .filter_map(|(kind, name)| Some((kind.to_owned(), name?.to_owned())))
        .collect();
    Ok(random.pick(&names).map(|(kind, name)| (kind.clone(), family, name.clone())))
}

fn delete_element(rig: &mut Rig, random: &mut Random) -> Result<Held> {
    // One that has elements is among a few; if none is, there is nothing to delete.
    for _ in 0..10 {
        let Some((kind, family, name)) = any_of(rig, random, &["map", "set"])? else { continue };
        let listing = listed(rig, &["-j", "list", &kind, family, "weir", &name])?;
        let entry = listing.iter().find_map(|entry| entry.get(&kind)).context("nft lists nothing")?;
        let elements = entry["elem"].as_array().cloned().unwrap_or_default();
        let Some(element) = random.pick(&elements).map(named) else { continue };
        let deletion = json!({ "nftables": [{ "delete": { "element": {
            "family": family, "table": "weir", "name": name, "elem": [element],
        } } }] });
        rig.topology.at(Place::Host(1)).stdout("nft", &["-j", &deletion.to_string()])?;
        break;
    }
    nothing()
}

/// What names an element: without its timeout and its counter.
fn named(element: &Value) -> Value {
    let key = |key: &Value| key.pointer("/elem/val").unwrap_or(key).clone();
    match element.as_array().map(Vec::as_slice) {
        Some([first, value]) => json!([key(first), value]),
        _ => key(element),
    }
}
