//! What happens to the agent's process: it is killed, it is there twice, memory, disk and clock fail it.

use std::{fs, thread, time::Duration};

use super::{Act, nothing};
use crate::suites::chaos::{
    cluster::{IN_FILE, SERVICES, Service},
    end_state::is_silent,
};

/// Seconds of a day.
const DAY: i64 = 86_400;
/// What the agent may need beside what it uses, for one that is not killed.
const ROOM: u64 = 48 << 20;
/// More bytes than the agent's `/run` has.
const RUN: usize = 32 << 20;
/// The file of Services that come while the agent is killed.
const GROWTH: &str = "growth";

pub(crate) const ACTS: &[Act] = &[
    Act::new("kill the agent", |rig, random| {
        thread::sleep(random.time(Duration::from_millis(300)));
        rig.kill_agent()?;
        is_silent(rig)?;
        rig.start_agent()?;
        nothing()
    }),
    Act::new("kill the agent during starts", |rig, random| {
        for _ in 0..3 {
            rig.kill_agent()?;
            rig.start_agent()?;
            thread::sleep(random.time(Duration::from_secs(2)));
        }
        rig.kill_agent()?;
        rig.start_agent()?;
        nothing()
    }),
    Act::new("kill the agent while Services come", |rig, random| {
        rig.write(GROWTH, &growth(random.below(2) == 0))?;
        thread::sleep(random.time(Duration::from_millis(800)));
        rig.kill_agent()?;
        rig.start_agent()?;
        nothing()
    })
    .undone(|rig| rig.remove(GROWTH)),
    Act::new("start a second agent", |rig, random| {
        rig.start_other_agent()?;
        thread::sleep(Duration::from_millis(500) + random.time(Duration::from_secs(2)));
        rig.kill_one(random.below(2) == 0)?;
        nothing()
    }),
    Act::new("give the agent little memory", |rig, _| {
        rig.memory.set(Some(rig.memory.used()? + ROOM))?;
        nothing()
    })
    .undone(|rig| rig.memory.set(None)),
    Act::new("give the agent too little memory", |rig, _| {
        let used = rig.memory.used()?;
        // The kernel refuses a limit that it cannot reclaim down to.
        let limited = rig.memory.set(Some(used / 2));
        rig.write(GROWTH, &growth(false))?;
        thread::sleep(Duration::from_secs(1));
        rig.memory.set(None)?;
        // The limit ends before the agent has to be well again.
        drop(limited);
        nothing()
    })
    .undone(|rig| rig.remove(GROWTH))
    .ending_the_agent(),
    Act::new("fill the disk at /run", |rig, _| {
        // The disk is full when this fails, which is what it is for.
        let _ = fs::write(rig.run_directory().join("filler"), vec![0; RUN]);
        nothing()
    })
    .undone(|rig| Ok(fs::remove_file(rig.run_directory().join("filler"))?)),
    Act::new("fill the disk at /run and start the agent again", |rig, _| {
        let _ = fs::write(rig.run_directory().join("filler"), vec![0; RUN]);
        rig.kill_agent()?;
        rig.start_agent()?;
        nothing()
    })
    .undone(|rig| Ok(fs::remove_file(rig.run_directory().join("filler"))?)),
    Act::new("let the clock jump", |rig, random| {
        let days = [-400, -1, 1, 400, 3_650];
        rig.clock.jump(random.pick(&days).map_or(0, |days| days * DAY))?;
        nothing()
    })
    .undone(|rig| rig.clock.jump(0)),
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
