//! Every file of `tests/scenarios`, played to the memory data plane and to nftables: both hold what the file says.
//!
//! `WEIR_BLESS=1` writes what memory holds into the files.

use std::{fs, net::IpAddr, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use similar::TextDiff;
use weir::{
    dataplane::{Dataplane, Memory, State, nftables::Nftables},
    model::{Family, ObjectName, PerFamily},
    plan::NodePortAddresses,
    source::{Change, Kind, Object},
};
use weir_tests::{
    agent::Agent,
    netns::Namespace,
    scenario::{Action, Scenario, render},
};

/// A data plane that can be opened anew and says where NodePorts answer, which no [`State`] has.
trait Plane: Dataplane + Sized {
    fn open(families: PerFamily<bool>) -> Result<Self>;
    fn node_ips(&mut self) -> Result<Vec<IpAddr>>;
}

impl Plane for Memory {
    fn open(_: PerFamily<bool>) -> Result<Self> {
        Ok(Self::default())
    }

    fn node_ips(&mut self) -> Result<Vec<IpAddr>> {
        let node = self.node().context("no node was planned")?;
        let of = |family| match node.node_port_addresses.get(family) {
            NodePortAddresses::AnyLocal => &node.host_addresses,
            NodePortAddresses::Only(addresses) => addresses,
        };
        let all = Family::ALL.into_iter().flat_map(|family| {
            of(family).iter().copied().filter(move |address| Family::of(*address) == family)
        });
        Ok(all.collect())
    }
}

impl Plane for Nftables {
    fn open(families: PerFamily<bool>) -> Result<Self> {
        Ok(Nftables::open(families)?)
    }

    fn node_ips(&mut self) -> Result<Vec<IpAddr>> {
        let mut all = Vec::new();
        for family in ["ip", "ip6"] {
            let listed =
                Command::new("nft").args(["-j", "list", "set", family, "weir", "node-ips"]).output()?;
            let listed: serde_json::Value = serde_json::from_slice(&listed.stdout)?;
            let elements = listed["nftables"]
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|object| object["set"]["elem"].as_array().cloned().unwrap_or_default());
            let mut addresses: Vec<IpAddr> = elements
                .map(|element| Ok(element.as_str().context("not an address")?.parse()?))
                .collect::<Result<_>>()?;
            addresses.sort_unstable();
            all.extend(addresses);
        }
        Ok(all)
    }
}

/// Plays a scenario; what is there at each expectation. Then everything is deleted, and nothing must be left.
fn play<P: Plane>(scenario: &Scenario) -> Result<Vec<String>> {
    let families = scenario.settings.families;
    let mut agent = Agent::new(scenario.settings.clone(), P::open(families)?);
    let mut objects: Vec<(Kind, ObjectName)> = Vec::new();
    let mut seen = Vec::new();
    let mut running = true;
    for step in &scenario.steps {
        match &step.action {
            Action::Change(changes) => {
                for change in changes {
                    objects.extend(applied(change));
                    agent.take_in(change.clone());
                }
            }
            Action::Host(addresses) => agent.model().set_host_addresses(addresses.clone()),
            Action::Stop => running = false,
            Action::Restart => {
                agent.restart(P::open(families)?);
                running = true;
            }
            Action::Expect => {
                let node_ips = agent.plane().node_ips()?;
                seen.push(render(&agent.dump()?, &node_ips));
                continue;
            }
        }
        if running {
            agent.bring_up_to_date().with_context(|| format!("line {}: {}", step.line, step.title))?;
        }
    }
    for (kind, name) in objects {
        agent.take_in(Change::Delete(kind, name));
    }
    agent.bring_up_to_date().context("deleting everything")?;
    let left = agent.dump()?;
    ensure!(left == State::default(), "left when everything is deleted:\n{}", render(&left, &[]));
    Ok(seen)
}

fn applied(change: &Change) -> Option<(Kind, ObjectName)> {
    match change {
        Change::Apply(object) => Some((object.kind(), Object::name(object))),
        _ => None,
    }
}

/// What went wrong in one scenario, by line.
fn differences(file: &str, scenario: &Scenario, seen: &[String]) -> String {
    let expectations = scenario.steps.iter().filter(|step| matches!(step.action, Action::Expect));
    let mut text = String::new();
    for (step, seen) in expectations.zip(seen).filter(|(step, seen)| step.body != **seen) {
        let diff = TextDiff::from_lines(step.body.as_str(), seen);
        text += &format!("\n{file}:{}: {}\n{}", step.line, step.title, diff.unified_diff());
    }
    text
}

fn run(play: impl Fn(&Scenario) -> Result<Vec<String>>, bless: bool) -> Result<()> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let files = fs::read_dir(&directory)?.map(|entry| Ok(entry?.path()));
    let mut files: Vec<_> = files.collect::<Result<_>>()?;
    files.sort();
    let mut failures = String::new();
    let mut expectations = 0;
    for path in files {
        let file = format!("tests/scenarios/{}", path.file_name().unwrap_or_default().to_string_lossy());
        let scenario = Scenario::parse(&fs::read_to_string(&path)?).with_context(|| file.clone())?;
        match play(&scenario) {
            Err(error) => failures += &format!("\n{file}: {error:#}\n"),
            Ok(seen) if bless => fs::write(&path, scenario.rewritten(&seen))?,
            Ok(seen) => {
                expectations += seen.len();
                failures += &differences(&file, &scenario, &seen);
            }
        }
    }
    ensure!(failures.is_empty(), "- expected, + seen:\n{failures}");
    ensure!(bless || expectations > 0, "no scenario expects anything");
    Ok(())
}

#[test]
fn memory_holds_what_scenarios_expect() {
    run(play::<Memory>, std::env::var_os("WEIR_BLESS").is_some()).unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn nftables_holds_what_scenarios_expect() {
    run(|scenario| Namespace::new("scenario")?.run(|| play::<Nftables>(scenario)), false)
        .unwrap_or_else(|error| panic!("{error:#}"));
}
