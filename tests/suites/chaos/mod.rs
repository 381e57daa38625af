//! Hostile acts, one after another, on a node with 2,000 Services under load: after each of them everything works again.
//!
//! ```text
//! seed ──▶ acts (a table) ──done to──▶ fixture (node, Services, clients, agent) ──▶ end_state (waited for) ──▶ report
//! ```
//!
//! `WEIR_CHAOS_MINUTES` is how long all of it lasts (3 without it), `WEIR_CHAOS_SEED` repeats a run, and `WEIR_CHAOS_ACTS`
//! leaves only acts with one of these parts in their names, separated by commas. `cargo xtask test chaos` has options for
//! all three.

#![deny(unsafe_code)]

mod acts;
mod clock;
mod cluster;
mod end_state;
mod fixture;
mod memory;
mod random;
mod report;
mod servers;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use weir_tests::subject::Plane;

use acts::Act;
use fixture::Fixture;
use random::Random;
use report::{Record, Report};

/// The longest recovery from an act, on a machine that has little else to do; a longer one is a fault.
const DEADLINE: Duration = Duration::from_secs(10);
/// On any other machine it is so many times what the first start took.
const STARTS: u32 = 3;
/// How long a node may take to come up, which is no act.
const FIRST: Duration = Duration::from_secs(60);
/// How long after an act that may end the agent it may take to notice and to end.
const ENDING: Duration = Duration::from_secs(20);
/// How long all tests of this suite last by default, in minutes.
const MINUTES: f64 = 3.0;

/// The options of a run.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// For each data plane.
    time: Duration,
    /// All random choices follow from it.
    seed: u64,
    /// Parts of the names of the acts; all acts without any.
    only: Vec<String>,
}

impl Settings {
    fn of_environment() -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let minutes = variable("WEIR_CHAOS_MINUTES")
            .map_or(Ok(MINUTES), |text| text.parse::<f64>().context("WEIR_CHAOS_MINUTES is no number"))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let seed = variable("WEIR_CHAOS_SEED")
            .map_or(Ok(now.as_secs()), |text| text.parse().context("WEIR_CHAOS_SEED is no number"))?;
        let only = variable("WEIR_CHAOS_ACTS").unwrap_or_default();
        let only = only.split(',').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        Ok(Self { time: Duration::from_secs_f64(minutes * 60.0 / 2.0), seed, only })
    }

    fn acts(&self, plane: Plane) -> Result<Vec<&'static Act>> {
        let mut acts = Act::all(plane);
        acts.retain(|act| {
            self.only.is_empty() || self.only.iter().any(|part| act.name.contains(part.as_str()))
        });
        if acts.is_empty() {
            bail!("no act has one of {:?} in its name", self.only);
        }
        Ok(acts)
    }
}

/// Every act once in an order by chance, then over again, until the time is over. A failure ends the node and not the run:
/// the next act meets a new one.
fn hostile_acts(plane: Plane) -> Result<()> {
    acts::raise_limits()?;
    let settings = Settings::of_environment()?;
    let begin = Instant::now();
    let mut report = Report::new(plane, &settings);
    let mut fixture = None;
    let mut left = Vec::new();
    for step in 0.. {
        let mut random = Random::of_step(settings.seed, step);
        if left.is_empty() {
            left = settings.acts(plane)?;
            random.shuffle(&mut left);
        }
        if begin.elapsed() > settings.time {
            break;
        }
        let Some(act) = left.pop() else { break };
        let record = one(&mut fixture, plane, act, &mut random)?;
        if record.failure.is_some() {
            fixture = None;
        }
        report.add(record);
    }
    if let Some(mut fixture) = fixture {
        let load = fixture.end_load()?;
        report.end_load(load);
    }
    report.print();
    report.verdict()
}

/// One act, on a node that serves.
fn one(
    fixture: &mut Option<Fixture>,
    plane: Plane,
    act: &'static Act,
    random: &mut Random,
) -> Result<Record> {
    let fixture = match fixture {
        Some(fixture) => fixture,
        None => {
            let mut new = Fixture::new(plane)?;
            let up = end_state::reach(&mut new, random, FIRST);
            let took =
                up.with_context(|| format!("before any act; the agent logged\n{}", new.last_words()))?;
            new.deadline = DEADLINE.max(took * STARTS);
            new.start_load()?;
            fixture.insert(new)
        }
    };
    let mut record = Record::new(act.name);
    let done = act_on(fixture, act, random, &mut record);
    if let Err(error) = done {
        record.failure = Some(format!("{error:#}\nthe agent logged\n{}", fixture.last_words()));
    }
    Ok(record)
}

fn act_on(fixture: &mut Fixture, act: &Act, random: &mut Random, record: &mut Record) -> Result<()> {
    let deadline = fixture.deadline;
    if act.ends_agent {
        fixture.may_end_until = Instant::now() + ENDING;
    }
    let held = (act.act)(fixture, random)?;
    record.under = Some(end_state::reach(fixture, random, deadline)?);
    drop(held);
    (act.undo)(fixture)?;
    record.after = Some(end_state::reach(fixture, random, deadline)?);
    end_state::all_serve(fixture, random, deadline)
}

#[test]
fn hostile_acts_harm_no_service_by_packets() -> Result<()> {
    hostile_acts(Plane::Nftables)
}

#[test]
fn hostile_acts_harm_no_service_at_sockets() -> Result<()> {
    hostile_acts(Plane::Ebpf)
}
