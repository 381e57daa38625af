//! Changes that go on all the time, while others are measured.
//!
//! In: a workload and a pace. Out: an API server that is written to at that pace; how often it was.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{
    runtime::Runtime,
    task::{JoinHandle, JoinSet},
    time::{MissedTickBehavior, interval},
};

use crate::{cluster::Objects, workload::Workload};

/// So many writes may be under way, and no two of the same slice, which would have to be written again and again; beyond
/// that the API server is slower than the pace.
const UNDER_WAY: u32 = 32;

pub(super) struct Churn {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Result<u32>>,
    begun: Instant,
}

pub(super) struct Churned {
    pub(super) writes: u32,
    pub(super) time: Duration,
}

impl Churn {
    /// Starts to take endpoints from one slice after the other, and to give them back in the next turn.
    #[must_use]
    pub(super) fn start(runtime: &Runtime, objects: Objects, workload: Workload, per_second: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let pace = Duration::from_secs(1) / per_second.max(1);
        let task = runtime.spawn(write(objects, workload, pace, Arc::clone(&stop)));
        Self { stop, task, begun: Instant::now() }
    }

    /// Ends it and gives back what was taken.
    pub(super) fn end(self, runtime: &Runtime) -> Result<Churned> {
        self.stop.store(true, Ordering::Release);
        let time = self.begun.elapsed();
        Ok(Churned { writes: runtime.block_on(self.task)??, time })
    }
}

async fn write(objects: Objects, workload: Workload, pace: Duration, stop: Arc<AtomicBool>) -> Result<u32> {
    let mut ticks = interval(pace);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut under_way, mut short, mut writes) = (JoinSet::new(), BTreeSet::new(), 0);
    for number in (0..workload.slices()).cycle() {
        if stop.load(Ordering::Acquire) {
            break;
        }
        ticks.tick().await;
        while under_way.len() >= UNDER_WAY.min(workload.slices()) as usize {
            finish(&mut under_way, &mut writes).await?;
        }
        let less = usize::from(short.insert(number));
        if less == 0 {
            short.remove(&number);
        }
        let (objects, slice) = (objects.clone(), workload.slice(number, less)?);
        under_way.spawn(async move { objects.rewrite(&slice).await.map(drop) });
    }
    while !under_way.is_empty() {
        finish(&mut under_way, &mut writes).await?;
    }
    for number in short {
        objects.rewrite(&workload.slice(number, 0)?).await?;
    }
    Ok(writes)
}

async fn finish(under_way: &mut JoinSet<Result<()>>, writes: &mut u32) -> Result<()> {
    under_way.join_next().await.context("nothing is under way")???;
    *writes += 1;
    Ok(())
}
