//! Every file of `tests/scenarios`, played to every data plane. Memory and nftables hold what the file expects; the socket plane
//! holds the part of it that is for sockets, and its maps hold what the file expects where it lists them.
//!
//! `WEIR_BLESS=1` writes what memory and the maps hold into the files.

use std::{collections::VecDeque, fs, net::IpAddr, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use proxy_ebpf::flag;
use similar::TextDiff;
use weir::{
    dataplane::{
        Dataplane, Memory, State,
        ebpf::{Ebpf, Place},
        nftables::Nftables,
    },
    model::{Change, Family, Kind, Object, ObjectName, PerFamily},
    plan::NodePortAddresses,
};
use weir_tests::{
    agent::Agent,
    bpffs::BpfFs,
    cgroup::Cgroup,
    maps::Maps,
    netns::Namespace,
    scenario::{Action, Scenario, render},
};

/// A data plane that can be opened anew and reports what no [`State`] has.
trait Plane: Dataplane + Sized {
    /// A new one that finds what others left in the place.
    fn open(families: PerFamily<bool>, place: &Place) -> Result<Self>;
    /// Where NodePorts answer.
    fn node_ips(&mut self, place: &Place) -> Result<Vec<IpAddr>>;
}

impl Plane for Memory {
    fn open(_: PerFamily<bool>, _: &Place) -> Result<Self> {
        Ok(Self::default())
    }

    fn node_ips(&mut self, _: &Place) -> Result<Vec<IpAddr>> {
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
    fn open(families: PerFamily<bool>, _: &Place) -> Result<Self> {
        Ok(Nftables::open(families)?)
    }

    fn node_ips(&mut self, _: &Place) -> Result<Vec<IpAddr>> {
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

impl Plane for Ebpf {
    fn open(_: PerFamily<bool>, place: &Place) -> Result<Self> {
        Ok(Ebpf::open(place.clone(), true)?)
    }

    fn node_ips(&mut self, place: &Place) -> Result<Vec<IpAddr>> {
        let addresses = Maps::read(place)?.addresses;
        let nodes =
            addresses.iter().filter(|(_, flags)| **flags & (flag::NODE | flag::LOOPBACK) == flag::NODE);
        let mut all: Vec<IpAddr> = nodes.map(|(key, _)| key.endpoint().ip()).collect();
        all.sort_unstable();
        Ok(all)
    }
}

/// The state at an expectation.
struct Seen {
    state: State,
    node_ips: Vec<IpAddr>,
}

/// Plays a scenario. Then everything is deleted, and nothing must be left. `see` looks at each expectation.
fn play<P: Plane>(
    scenario: &Scenario,
    place: &Place,
    mut see: impl FnMut(&Action, Seen) -> Result<Option<String>>,
) -> Result<Vec<Option<String>>> {
    let open = || P::open(scenario.settings.families, place);
    let mut agent = Agent::new(scenario.settings.clone(), open()?);
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
                agent.restart(open()?);
                running = true;
            }
            Action::Expect | Action::Maps => {
                let there = Seen { node_ips: agent.plane().node_ips(place)?, state: agent.dump()? };
                seen.push(see(&step.action, there)?);
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

/// Plays a scenario to a plane that holds everything: what it holds at each expectation.
fn whole<P: Plane>(scenario: &Scenario, place: &Place) -> Result<Vec<Option<String>>> {
    play::<P>(scenario, place, |action, Seen { state, node_ips }| {
        Ok(matches!(action, Action::Expect).then(|| render(&state, &node_ips)))
    })
}

/// Plays a scenario to memory and to the socket plane, which holds the part of the same that is for sockets.
/// Returns the content of its maps where the file lists them.
fn at_sockets(scenario: &Scenario, place: &Place) -> Result<Vec<Option<String>>> {
    let mut wanted = VecDeque::new();
    play::<Memory>(scenario, place, |_, Seen { state, node_ips }| {
        wanted.push_back(render(&state.for_sockets(), &node_ips));
        Ok(None)
    })?;
    play::<Ebpf>(scenario, place, |action, Seen { state, node_ips }| {
        let (wanted, seen) = (wanted.pop_front().unwrap_or_default(), render(&state, &node_ips));
        ensure!(wanted == seen, "\n{}", TextDiff::from_lines(&wanted, &seen).unified_diff());
        matches!(action, Action::Maps).then(|| Ok(Maps::read(place)?.to_string())).transpose()
    })
}

fn applied(change: &Change) -> Option<(Kind, ObjectName)> {
    match change {
        Change::Apply(object) => Some((object.kind(), Object::name(object))),
        _ => None,
    }
}

/// The failed expectations of one scenario, by line.
fn differences(file: &str, scenario: &Scenario, seen: &[Option<String>]) -> String {
    let mut text = String::new();
    for (step, seen) in scenario.expectations().zip(seen) {
        let Some(seen) = seen.as_ref().filter(|seen| step.body != **seen) else { continue };
        let diff = TextDiff::from_lines(step.body.as_str(), seen);
        text += &format!("\n{file}:{}: {}\n{}", step.line, step.title, diff.unified_diff());
    }
    text
}

fn run(play: impl Fn(&Scenario) -> Result<Vec<Option<String>>>, bless: bool) -> Result<()> {
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
                expectations += seen.iter().flatten().count();
                failures += &differences(&file, &scenario, &seen);
            }
        }
    }
    ensure!(failures.is_empty(), "- expected, + seen:\n{failures}");
    ensure!(bless || expectations > 0, "no scenario expects anything");
    Ok(())
}

/// For planes that need no place.
fn nowhere() -> Place {
    Place { bpf_root: PathBuf::new(), cgroup_root: PathBuf::new() }
}

fn bless() -> bool {
    std::env::var_os("WEIR_BLESS").is_some()
}

#[test]
fn memory_holds_what_scenarios_expect() {
    run(|scenario| whole::<Memory>(scenario, &nowhere()), bless())
        .unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn nftables_holds_what_scenarios_expect() {
    run(|scenario| Namespace::new("scenario")?.run(|| whole::<Nftables>(scenario, &nowhere())), false)
        .unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn the_maps_hold_what_scenarios_expect_of_sockets() {
    let cgroup = Cgroup::new("scenarios").unwrap();
    let play = |scenario: &Scenario| {
        let files = BpfFs::new()?;
        let place = Place { bpf_root: files.directory("weir")?, cgroup_root: cgroup.path().to_owned() };
        at_sockets(scenario, &place)
    };
    run(play, bless()).unwrap_or_else(|error| panic!("{error:#}"));
}
