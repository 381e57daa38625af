//! The invariants of the socket plane's maps: they hold what the objects mean, nothing else and nothing
//! twice; a restart moves nothing; while writes fail every frontend has its old or its new destination, or is
//! left to the nftables plane.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use anyhow::anyhow;
use proptest::{prelude::*, test_runner::TestRunner};
use weir::{
    dataplane::{
        Memory, Outcome, State,
        ebpf::{Ebpf, Fault, Place, Problem},
    },
    model::{NodePortSetting, Settings},
    plan::{Destination, Frontend, PortId, PortPlan},
};
use weir_tests::{agent::Agent, bpffs::BpfFs, cgroup::Cgroup, maps::Maps};

use super::{
    cluster::{Step, delete_everything, history, host, summary},
    settle,
};

/// With every address of the host for NodePorts, so that they come and go.
fn settings() -> Settings {
    Settings { node_port_addresses: NodePortSetting::ALL, ..super::cluster::settings() }
}

/// A plane in its own place, to which one history after another is played: what one leaves the next finds.
struct Kernel {
    agent: Agent<Ebpf>,
    place: Place,
    restarts: u32,
}

impl Kernel {
    fn new(files: &BpfFs, cgroup: &Cgroup, name: &str) -> anyhow::Result<Self> {
        let place = Place { bpf_root: files.directory(name)?, cgroup_root: cgroup.path().to_owned() };
        Ok(Self { agent: Agent::new(settings(), open(&place)?), place, restarts: 0 })
    }

    /// Begins another history, with nothing.
    fn begin(&mut self) -> Result<(), TestCaseError> {
        self.agent.plane().fail_writes(None);
        self.agent.forget(settings())?;
        self.agent.bring_up_to_date()?;
        prop_assert_eq!(self.agent.dump()?, State::default());
        Ok(())
    }

    fn maps(&self) -> Result<Maps, TestCaseError> {
        Maps::read(&self.place).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    }

    /// Opens the maps once more. Every now and then by a new plane, which takes long.
    fn restart(&mut self) -> Result<(), TestCaseError> {
        self.restarts += 1;
        if self.restarts.is_multiple_of(8) {
            self.agent.restart(open(&self.place)?);
        } else {
            self.agent.reread()?;
        }
        Ok(())
    }

    /// Brings both up to date. A ClusterIP that moves to the host or away has everything written anew.
    fn tell(&mut self, memory: &mut Agent<Memory>) -> Result<(), TestCaseError> {
        memory.bring_up_to_date()?;
        Ok(self.agent.bring_up_to_date().or_else(|_| self.agent.bring_up_to_date())?)
    }

    /// The maps of a plane that gets all remaining objects in one delta.
    fn rebuild(&mut self, steps: Vec<&Step>) -> Result<Maps, TestCaseError> {
        self.begin()?;
        self.agent.forget(settings())?;
        steps.into_iter().for_each(|step| step.happen(&mut self.agent));
        self.agent.bring_up_to_date()?;
        self.maps()
    }
}

fn open(place: &Place) -> Result<Ebpf, Problem> {
    Ebpf::open(place.clone(), true)
}

/// Plays histories to a plane, beside another one that is built fresh.
fn play<S: Strategy>(
    histories: S,
    test: impl Fn(&mut Kernel, &mut Kernel, S::Value) -> Result<(), TestCaseError>,
) -> anyhow::Result<()> {
    let (cgroup, files) = (Cgroup::new("histories")?, BpfFs::new()?);
    let kernel = |name| Kernel::new(&files, &cgroup, name).map(RefCell::new);
    let (kernel, fresh) = (kernel("history")?, kernel("fresh")?);
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    let played = TestRunner::new(config).run(&histories, |history| {
        let (mut kernel, mut fresh) = (kernel.borrow_mut(), fresh.borrow_mut());
        kernel.begin()?;
        test(&mut kernel, &mut fresh, history)
    });
    played.map_err(|error| anyhow!("{error}"))
}

/// The maps' expected content for the content of `memory`.
fn expected(memory: &mut Agent<Memory>) -> Result<State, TestCaseError> {
    let node = memory.plane().node().cloned();
    expected_with(memory, &node.map(|node| node.host_addresses).unwrap_or_default())
}

/// The same on a host with these addresses: ClusterIPs that it has itself are the packets'.
fn expected_with(memory: &mut Agent<Memory>, host: &[IpAddr]) -> Result<State, TestCaseError> {
    let mut state = memory.dump()?.for_sockets();
    let (at_home, apart) = state.cluster_ips.into_iter().partition::<Vec<_>, _>(|ip| host.contains(ip));
    state.cluster_ips = apart;
    for (frontend, installed) in &mut state.frontends {
        if matches!(frontend.destination, Destination::Address(address) if at_home.contains(&address)) {
            installed.pod.clone_from(&installed.outside);
            installed.host.clone_from(&installed.outside);
            installed.affinity = None;
        }
    }
    Ok(state)
}

fn owners(memory: &mut Agent<Memory>) -> BTreeMap<Frontend, PortId> {
    let ports = memory.plane().ports();
    let owned = |port: &Arc<PortPlan>| {
        port.frontends.iter().map(|planned| (planned.frontend, port.id.clone())).collect::<Vec<_>>()
    };
    ports.flat_map(owned).collect()
}

/// Writes that fail by a xorshift generator: always the same ones for the same seed.
fn failing(seed: u64, per_cent: u64) -> Fault {
    let mut random = seed.max(1);
    Box::new(move |_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 32) % 100 < per_cent
    })
}

/// The maps' content after an attempt that failed, as sockets see it.
#[derive(Default)]
struct Between {
    before: State,
}

impl Between {
    /// Each frontend is as before, or as it is to be, or left to the packets: as `wanted`, or as `others` have it while it
    /// is not known whether its address is the host's own. No address refuses others before its frontends are there.
    fn holds(&mut self, now: State, wanted: &State, others: [&State; 2]) -> Result<(), TestCaseError> {
        let known: BTreeSet<&Frontend> =
            [&self.before, &now, wanted].into_iter().flat_map(|state| state.frontends.keys()).collect();
        for frontend in known {
            let there = now.frontends.get(frontend);
            let fits = [&self.before, wanted]
                .into_iter()
                .chain(others)
                .any(|state| there == state.frontends.get(frontend));
            let left = there.is_none_or(|there| {
                there.pod.outcome == Outcome::Packets && there.host.outcome == Outcome::Packets
            });
            prop_assert!(fits || left, "{}: {:?}, not {:?}", frontend, there, wanted.frontends.get(frontend));
            let Destination::Address(address) = frontend.destination else { continue };
            let refused = |state: &State| {
                !state.frontends.contains_key(frontend) && state.cluster_ips.contains(&address)
            };
            let fits = !wanted.frontends.contains_key(frontend) || !refused(&now) || refused(&self.before);
            prop_assert!(fits, "sockets refuse {} to the packets", frontend);
        }
        self.before = now;
        Ok(())
    }
}

#[test]
fn maps_after_a_history_are_maps_built_fresh() -> anyhow::Result<()> {
    play(history(), |kernel, fresh, history| {
        let mut memory = Agent::new(settings(), Memory::default());
        for (step, told) in &history {
            step.happen(&mut kernel.agent);
            step.happen(&mut memory);
            if *told {
                kernel.tell(&mut memory)?;
                prop_assert_eq!(kernel.agent.dump()?, expected(&mut memory)?, "after {:?}", step);
            }
        }
        kernel.tell(&mut memory)?;
        let maps = kernel.maps()?;
        prop_assert_eq!(maps.groups(), fresh.rebuild(summary(&history))?.groups());
        kernel.restart()?;
        kernel.tell(&mut memory)?;
        let found = kernel.maps()?;
        prop_assert_eq!(found.frontends, maps.frontends, "a restart that changes nothing");
        prop_assert_eq!(found.slots, maps.slots);
        delete_everything(&mut kernel.agent);
        delete_everything(&mut memory);
        kernel.tell(&mut memory)?;
        let left = kernel.maps()?;
        prop_assert!(left.frontends.is_empty(), "left: {:?}", left.frontends);
        prop_assert!(left.members.is_empty(), "left: {:?}", left.members);
        Ok(())
    })
}

/// A new agent repairs changes from the time without an agent; a frontend that its port kept keeps its
/// number.
#[test]
fn a_new_agent_finds_the_numbers_of_the_old_one() -> anyhow::Result<()> {
    play((history(), history()), |kernel, _, (before, meanwhile)| {
        let mut memory = Agent::new(settings(), Memory::default());
        for (step, _) in &before {
            step.happen(&mut kernel.agent);
            step.happen(&mut memory);
        }
        kernel.tell(&mut memory)?;
        let (maps, owned) = (kernel.maps()?, owners(&mut memory));
        for (step, _) in &meanwhile {
            step.happen(&mut kernel.agent);
            step.happen(&mut memory);
        }
        kernel.restart()?;
        kernel.tell(&mut memory)?;
        prop_assert_eq!(kernel.agent.dump()?, expected(&mut memory)?);
        let now = owners(&mut memory);
        // A port that gets another's frontend may get the other's number with it.
        if now.iter().all(|(frontend, id)| owned.get(frontend).is_none_or(|before| before == id)) {
            for (key, value) in kernel.maps()?.frontends {
                let number = maps.frontends.get(&key).map_or(value.port, |was| was.port);
                prop_assert_eq!(number, value.port, "the number of {:?}", key);
            }
        }
        Ok(())
    })
}

#[test]
fn maps_that_keep_failing_get_there() -> anyhow::Result<()> {
    play((history(), any::<u64>()), |kernel, fresh, (history, seed)| {
        let mut memory = Agent::new(settings(), Memory::default());
        kernel.agent.plane().fail_writes(Some(failing(seed, 10)));
        let mut between = Between::default();
        for (step, told) in &history {
            step.happen(&mut kernel.agent);
            step.happen(&mut memory);
            if *told {
                memory.bring_up_to_date()?;
                let done = kernel.agent.bring_up_to_date().is_ok();
                let (now, wanted) = (kernel.agent.dump()?, expected(&mut memory)?);
                if done {
                    prop_assert_eq!(&now, &wanted, "after {:?}", step);
                }
                let (home, away) =
                    (expected_with(&mut memory, &host(u16::MAX))?, expected_with(&mut memory, &[])?);
                between.holds(now, &wanted, [&home, &away])?;
            }
        }
        memory.bring_up_to_date()?;
        settle(&mut kernel.agent)?;
        prop_assert_eq!(kernel.agent.dump()?, expected(&mut memory)?);
        prop_assert_eq!(kernel.maps()?.groups(), fresh.rebuild(summary(&history))?.groups());
        Ok(())
    })
}

/// A NodePort goes from a Service that is deleted to another while no agent runs. The other one finds the NodePort's number
/// with it, and at no write do clients of the deleted Service's own address get to its backends.
#[test]
fn a_number_that_another_service_finds_takes_no_client_along() -> anyhow::Result<()> {
    let before = [Step::Service { name: 3, created: 0, shape: 0x2200 }, slice(3, 1)];
    let meanwhile = [Step::NoService(3), Step::Service { name: 1, created: 1, shape: 0x2100 }, slice(1, 2)];
    let interrupted = Cell::new(0);
    play(1_u32..40, |kernel, _, writes| {
        let mut memory = Agent::new(settings(), Memory::default());
        let happen = |step: &Step, kernel: &mut Kernel, memory: &mut Agent<Memory>| {
            step.happen(&mut kernel.agent);
            step.happen(memory);
        };
        before.iter().for_each(|step| happen(step, kernel, &mut memory));
        kernel.tell(&mut memory)?;
        let was = kernel.agent.dump()?;
        meanwhile.iter().for_each(|step| happen(step, kernel, &mut memory));
        kernel.agent.reread()?;
        let mut written = 0;
        kernel.agent.plane().fail_writes(Some(Box::new(move |_| {
            written += 1;
            written > writes
        })));
        memory.bring_up_to_date()?;
        interrupted.set(interrupted.get() + u32::from(kernel.agent.bring_up_to_date().is_err()));
        let wanted = expected(&mut memory)?;
        Between { before: was }.holds(kernel.agent.dump()?, &wanted, [&wanted, &wanted])
    })?;
    anyhow::ensure!(interrupted.get() > 0, "no write failed");
    Ok(())
}

/// One endpoint of a Service.
fn slice(service: u8, endpoint: u16) -> Step {
    Step::Slice { name: service, service, v6: false, endpoints: vec![endpoint] }
}
