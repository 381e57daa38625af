//! Random sequences of calls on real sockets, once with eBPF at the sockets and once by packets alone: both answer as if what is
//! sent was translated packet by packet.
//!
//! ```text
//! sequence (chance) ─▶ player (real sockets in a world of each plane) ─▶ model (what may be answered)
//! ```
//!
//! 2,000 sequences are played, the same ones each time, so that a change is not blamed for what another one left. Others, and more, are
//! by hand: `PROPTEST_CASES=100000 cargo xtask test calls`. A failure prints its seed, with which `WEIR_CALLS_SEED` plays the same
//! sequences again, and the shortest sequence found that fails. Which of its backends a Service draws is chance that no seed brings back.

#![deny(unsafe_code)]

use std::{
    cell::Cell,
    env, fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use self::{
    model::Row,
    player::{Trouble, play},
    sequence::{Sequence, sequences},
    world::{PATIENCE, Plane, World},
};

mod model;
mod player;
mod sequence;
mod servers;
mod world;

/// So many sequences are played by default.
const SEQUENCES: u32 = 2_000;
/// Which ones.
const SEED: u64 = 1;
/// So many threads play them, each with worlds of its own. With another number a seed means other sequences.
const THREADS: usize = 8;
/// Attempts of a shorter sequence until it counts as one that does not fail, because draws are chance.
const TRIES: u32 = 16;
/// How long a shorter sequence waits for what has to come.
const SHORT: Duration = Duration::from_millis(500);

fn number<T: std::str::FromStr>(variable: &str) -> Result<Option<T>> {
    let Ok(value) = env::var(variable) else { return Ok(None) };
    value.parse().map(Some).map_err(|_| anyhow!("{variable} is {value:?}, which is no number"))
}

/// The state that all threads share.
struct Run {
    seed: u64,
    played: AtomicU32,
    /// One has failed, so the others may end.
    over: AtomicBool,
}

impl Run {
    /// Plays sequences in a world of each plane.
    fn play(&self, thread: usize, cases: u32) -> Result<()> {
        let worlds = [Plane::Packets, Plane::Sockets].map(|plane| World::new(plane, thread).map(Arc::new));
        let [packets, sockets] = worlds;
        let worlds = [packets?, sockets?];
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..16].copy_from_slice(&(thread as u64).to_le_bytes());
        let config = Config {
            cases,
            failure_persistence: None,
            max_shrink_iters: 1_000,
            max_shrink_time: 120_000,
            ..Config::default()
        };
        let failed = Cell::new(false);
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let played = TestRunner::new_with_rng(config, rng).run(&sequences(), |sequence| {
            if self.over.load(Relaxed) && !failed.get() {
                return Ok(());
            }
            self.played.fetch_add(u32::from(!failed.get()), Relaxed);
            let (tries, patience) = if failed.get() { (TRIES, SHORT) } else { (1, PATIENCE) };
            for _ in 0..tries {
                for world in &worlds {
                    let played = play(world, &sequence, patience);
                    failed.set(failed.get() || played.is_err());
                    self.over.fetch_or(played.is_err(), Relaxed);
                    played.map_err(|trouble| TestCaseError::fail(message(trouble)))?;
                }
            }
            Ok(())
        });
        match played {
            Ok(()) => Ok(()),
            Err(TestError::Fail(why, sequence)) => Err(self.failure(&sequence, why.message())),
            Err(TestError::Abort(why)) => bail!("{why}"),
        }
    }

    fn failure(&self, sequence: &Sequence, why: &str) -> anyhow::Error {
        let (seed, played) = (self.seed, self.played.load(Relaxed));
        anyhow!("after {played} sequences with WEIR_CALLS_SEED={seed}\n{sequence}\nplayed:\n{why}")
    }
}

fn message(trouble: Trouble) -> String {
    match trouble {
        Trouble::Wrong(what) => what,
        Trouble::Broken(error) => format!("the sequence could not be played: {error:#}"),
    }
}

#[test]
fn sockets_answer_as_if_packets_were_translated() -> Result<()> {
    let asked = number("PROPTEST_CASES")?;
    let cases = asked.unwrap_or(SEQUENCES);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let usual = if asked.is_some() { now.as_nanos() as u64 } else { SEED };
    let seed = number("WEIR_CALLS_SEED")?.unwrap_or(usual);
    let run = Run { seed, played: AtomicU32::new(0), over: AtomicBool::new(false) };
    let begun = Instant::now();
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let run = &run;
        let play = |thread| scope.spawn(move || run.play(thread, cases.div_ceil(THREADS as u32)));
        let threads: Vec<_> = (0..THREADS).map(play).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread died"))?).collect()
    });
    println!("{} sequences in {:?}, WEIR_CALLS_SEED={seed}", run.played.load(Relaxed), begun.elapsed());
    results.into_iter().collect()
}

#[test]
fn every_allowance_is_a_row_of_the_documented_differences() -> Result<()> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/differences.md");
    let page = fs::read_to_string(page)?;
    let (_, table) = page.split_once("## At sockets").context("the page has no table for sockets")?;
    for row in Row::ALL {
        let begins = format!("\n| {} |", row.begins());
        anyhow::ensure!(table.contains(&begins), "no row begins with {}", row.begins());
    }
    Ok(())
}
