//! Faults of the agent's process: it is killed, it runs twice, memory, disk and clock fail it.

use std::{fs, thread, time::Duration};

use super::{Act, nothing};
use crate::suites::chaos::{
    cluster::{IN_FILE, SERVICES, Service},
    end_state::is_silent,
};

/// Seconds of a day.
const DAY: i64 = 86_400;
/// Memory beyond the present use, for an agent that is not to be killed.
const ROOM: u64 = 48 << 20;
/// More bytes than the agent's `/run` has.
const RUN: usize = 32 << 20;
/// The file of Services that come while the agent is killed.
const GROWTH: &str = "growth";

pub(crate) const ACTS: &[Act] = &[
    Act::new("kill the agent", |fixture, random| {
        thread::sleep(random.time(Duration::from_millis(300)));
        fixture.kill_agent()?;
        is_silent(fixture)?;
        fixture.start_agent()?;
        nothing()
    }),
    Act::new("kill the agent during starts", |fixture, random| {
        for _ in 0..3 {
            fixture.kill_agent()?;
            fixture.start_agent()?;
            thread::sleep(random.time(Duration::from_secs(2)));
        }
        fixture.kill_agent()?;
        fixture.start_agent()?;
        nothing()
    }),
    Act::new("kill the agent while Services come", |fixture, random| {
        fixture.write(GROWTH, &growth(random.below(2) == 0))?;
        thread::sleep(random.time(Duration::from_millis(800)));
        fixture.kill_agent()?;
        fixture.start_agent()?;
        nothing()
    })
    .undone(|fixture| fixture.remove(GROWTH)),
    Act::new("start a second agent", |fixture, random| {
        fixture.start_other_agent()?;
        thread::sleep(Duration::from_millis(500) + random.time(Duration::from_secs(2)));
        fixture.kill_one(random.below(2) == 0)?;
        nothing()
    }),
    Act::new("give the agent little memory", |fixture, _| {
        fixture.memory.set(Some(fixture.memory.used()? + ROOM))?;
        nothing()
    })
    .undone(|fixture| fixture.memory.set(None)),
    Act::new("give the agent too little memory", |fixture, _| {
        let used = fixture.memory.used()?;
        // The kernel refuses a limit that it cannot reclaim down to.
        let limited = fixture.memory.set(Some(used / 2));
        fixture.write(GROWTH, &growth(false))?;
        thread::sleep(Duration::from_secs(1));
        fixture.memory.set(None)?;
        // The limit ends before the agent has to be well again.
        drop(limited);
        nothing()
    })
    .undone(|fixture| fixture.remove(GROWTH))
    .ending_the_agent(),
    Act::new("fill the disk at /run", |fixture, _| {
        // The disk is full when this fails, which is what it is for.
        let _ = fs::write(fixture.run_directory().join("filler"), vec![0; RUN]);
        nothing()
    })
    .undone(|fixture| Ok(fs::remove_file(fixture.run_directory().join("filler"))?)),
    Act::new("fill the disk at /run and start the agent again", |fixture, _| {
        let _ = fs::write(fixture.run_directory().join("filler"), vec![0; RUN]);
        fixture.kill_agent()?;
        fixture.start_agent()?;
        nothing()
    })
    .undone(|fixture| Ok(fs::remove_file(fixture.run_directory().join("filler"))?)),
    Act::new("let the clock jump", |fixture, random| {
        let days = [-400, -1, 1, 400, 3_650];
        fixture.clock.jump(random.pick(&days).map_or(0, |days| days * DAY))?;
        nothing()
    })
    .undone(|fixture| fixture.clock.jump(0)),
];

/// Services beside the others, that nothing is asked of: what matters is that they come at a bad moment.
fn growth(many: bool) -> Vec<serde_json::Value> {
    let count = if many { 5 * IN_FILE } else { IN_FILE };
    let first = SERVICES + 10;
    let objects = (first..first + count).flat_map(|number| plain(Service(number)));
    objects.collect()
}

/// Without what could meet the ports of others.
fn plain(service: Service) -> Vec<serde_json::Value> {
    let mut objects = service.objects();
    objects[0]["status"] = serde_json::json!({});
    let spec = &mut objects[0]["spec"];
    for field in ["healthCheckNodePort", "externalTrafficPolicy", "loadBalancerSourceRanges"] {
        if let Some(spec) = spec.as_object_mut() {
            spec.remove(field);
        }
    }
    spec["type"] = "ClusterIP".into();
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        if let Some(port) = port.as_object_mut() {
            port.remove("nodePort");
        }
    }
    objects
}
