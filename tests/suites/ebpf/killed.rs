//! An agent that is killed between any two things it does to names in the BPF file system, and names that are not ours.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, MapInfo};
use proxy_ebpf::Endpoint;
use weir::{
    dataplane::{
        Dataplane as _,
        ebpf::{Ebpf, Place, repin},
    },
    machine::probe::Probe,
    model::{Family, Protocol},
    plan::{Delta, PortDelta, PortPlan},
};
use weir_tests::{bpffs::BpfFs, wait::await_that};

use super::{Fixture, come, complete, crowd, open, port, service_ip};

/// So many Services that the maps of an agent that has none have to grow.
const MANY: u32 = 1100;

/// Opens a place, serves, and makes the maps grow, until it is killed before the operation of this number.
fn killed(place: &Place, web: &Arc<PortPlan>, before: u32) -> Result<bool> {
    let set_retval = Probe::of(&place.cgroup_root, &place.bpf_root).set_retval;
    let done = AtomicU32::new(0);
    let done = Arc::new(done);
    let counted = Arc::clone(&done);
    let interrupt = move |_: &Path| {
        if counted.fetch_add(1, Relaxed) == before {
            // No more of this agent is run but that its descriptors are closed.
            resume_unwind(Box::new("killed"));
        }
    };
    let agent = || -> Result<()> {
        let mut plane = Ebpf::open_interrupted(place.clone(), set_retval, Box::new(interrupt))?;
        plane.apply(&complete(vec![Arc::clone(web)]))?;
        plane.apply(&come(crowd(0, MANY)))?;
        Ok(())
    };
    match catch_unwind(AssertUnwindSafe(agent)) {
        Ok(result) => result.map(|()| false),
        Err(_) => Ok(true),
    }
}

/// Whether a client has come.
fn is_asked(listener: &TcpListener) -> bool {
    listener.accept().is_ok()
}

/// The generations that there are, and the one that `current` leads to.
fn generations(place: &Place) -> Result<(Vec<String>, String)> {
    let current = fs::read_link(place.services())?;
    let above = place.services().parent().context("a directory above")?.to_owned();
    let mut names = Vec::new();
    for entry in fs::read_dir(above)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| name != "current");
    Ok((names, current.to_string_lossy().into_owned()))
}

#[test]
fn an_agent_that_starts_after_one_was_killed_anywhere_serves_what_is_to_be() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let (first, second) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        [&first, &second].into_iter().try_for_each(|listener| listener.set_nonblocking(true))?;
        let web = |listener: &TcpListener| -> Result<_> {
            Ok(port(Family::V4, Protocol::Tcp, &[listener.local_addr()?]))
        };
        let (old, new) = (web(&first)?, web(&second)?);
        for before in 0.. {
            let was_killed = killed(&fixture.place, &old, before)?;
            let served = fixture.place.bpf_root.join("link-connect4").exists();
            if served {
                TcpStream::connect((service_ip(Family::V4), 80)).context("a pinned program serves")?;
                await_that(&format!("the old backend is asked, killed before operation {before}"), || {
                    is_asked(&first)
                });
            }
            let mut heir =
                open(&fixture.place).with_context(|| format!("opening after {before} operations"))?;
            if served {
                TcpStream::connect((service_ip(Family::V4), 80))
                    .context("an open must not end what serves")?;
                await_that("the old backend is asked after the open", || is_asked(&first));
            }
            // Programs read the next writes: they and the agent have the same maps.
            heir.apply(&complete(vec![Arc::clone(&old)]))?;
            let change = PortDelta { before: Some(Arc::clone(&old)), after: Some(Arc::clone(&new)) };
            heir.apply(&Delta { ports: vec![change], ..Default::default() })?;
            TcpStream::connect((service_ip(Family::V4), 80))
                .with_context(|| format!("killed before {before}"))?;
            await_that(&format!("the new backend is asked, killed before operation {before}"), || {
                is_asked(&second)
            });
            assert_eq!(heir.dump()?.frontends.len(), 2);
            let (all, current) = generations(&fixture.place)?;
            assert_eq!(all, [current], "killed before operation {before}");
            heir.remove()?;
            // The kernel detaches programs some time after their links are gone.
            let leads = || TcpStream::connect((service_ip(Family::V4), 80)).is_ok();
            await_that("nothing serves any more", || !leads());
            while is_asked(&second) {}
            if !was_killed {
                ensure!(before > 40, "only {before} operations");
                return Ok(());
            }
        }
        Ok(())
    })
}

/// Every map of a place, with where it is pinned and its number.
fn maps(place: &Place) -> Result<Vec<(PathBuf, u32)>> {
    let mut maps = Vec::new();
    for directory in [place.services(), place.sockets()] {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let number = MapInfo::from_pin(&path)?.id();
            maps.push((path, number));
        }
    }
    maps.sort_unstable();
    Ok(maps)
}

#[test]
fn a_map_without_a_name_gets_it_again_and_no_service_reaches_another() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let web = port(Family::V4, Protocol::Tcp, &[listener.local_addr()?]);
        let serves = || -> Result<()> {
            let socket = TcpStream::connect((service_ip(Family::V4), 80))?;
            await_that("its own backend is asked", || is_asked(&listener));
            assert_eq!(socket.peer_addr()?, (service_ip(Family::V4), 80).into());
            Ok(())
        };
        let mut plane = open(&fixture.place)?;
        plane.apply(&complete(vec![Arc::clone(&web)]))?;
        let early = TcpStream::connect((service_ip(Family::V4), 80))?;
        await_that("its own backend is asked", || is_asked(&listener));
        let whole = maps(&fixture.place)?;
        ensure!(whole.len() == 19, "{whole:?}");
        for (pin, _) in &whole {
            fs::remove_file(pin)?;
            assert_eq!(repin(&fixture.place)?.len(), 1, "{} while an agent runs", pin.display());
            assert_eq!(maps(&fixture.place)?, whole);
            fs::remove_file(pin)?;
            drop(plane);
            plane = open(&fixture.place)?;
            assert_eq!(maps(&fixture.place)?, whole, "{} while none runs", pin.display());
            serves()?;
            plane.apply(&complete(vec![Arc::clone(&web)]))?;
            serves()?;
            assert_eq!(early.peer_addr()?, (service_ip(Family::V4), 80).into());
        }
        // All at once, of Services as of sockets.
        whole.iter().try_for_each(|(pin, _)| fs::remove_file(pin))?;
        drop(plane);
        plane = open(&fixture.place)?;
        serves()?;
        plane.apply(&complete(vec![web]))?;
        // Of these maps nothing was known, so other programs are attached in the place of theirs, which the kernel detaches
        // when it gets round to it.
        await_that("sockets are shown the Service by the programs that lead them", || {
            let socket = TcpStream::connect((service_ip(Family::V4), 80));
            let peer = socket.and_then(|socket| socket.peer_addr());
            peer.is_ok_and(|peer| peer == (service_ip(Family::V4), 80).into())
        });
        while is_asked(&listener) {}
        serves()?;
        plane.remove()?;
        Ok(())
    })
}

/// Another program's map under the name of one of ours: the programs that are attached are to read what the agent writes.
#[test]
fn programs_meet_the_maps_that_the_agent_writes_whatever_their_names_lead_to() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let (first, second) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        [&first, &second].into_iter().try_for_each(|listener| listener.set_nonblocking(true))?;
        let web = |listener: &TcpListener| -> Result<_> {
            Ok(port(Family::V4, Protocol::Tcp, &[listener.local_addr()?]))
        };
        let mut plane = open(&fixture.place)?;
        plane.apply(&complete(vec![web(&first)?]))?;
        drop(plane);
        let slots = fixture.place.services().join("slots");
        let room = MapInfo::from_pin(&slots)?.max_entries();
        fs::remove_file(&slots)?;
        Array::<_, [u8; size_of::<Endpoint>()]>::create(room, 0)?.pin(&slots)?;
        let mut plane = open(&fixture.place)?;
        plane.apply(&Delta { complete: false, ..complete(vec![web(&second)?]) })?;
        TcpStream::connect((service_ip(Family::V4), 80))?;
        await_that("the backend that was written is asked", || is_asked(&second));
        assert!(!is_asked(&first));
        plane.remove()?;
        Ok(())
    })
}

#[test]
fn sockets_are_remembered_when_the_maps_of_services_are_laid_out_anew() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.inside.run(|| -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let web = port(Family::V4, Protocol::Tcp, &[listener.local_addr()?]);
        let mut former = open(&fixture.place)?;
        former.apply(&complete(vec![Arc::clone(&web)]))?;
        let socket = TcpStream::connect((service_ip(Family::V4), 80))?;
        drop(former);
        // As an agent with another layout would have left it.
        let ours = fixture.place.services().parent().context("a directory above")?.to_owned();
        let other = ours.with_file_name("services-4000000");
        fs::rename(&ours, &other)?;
        let mut plane = open(&fixture.place)?;
        assert!(other.exists(), "programs still use it");
        assert_eq!(socket.peer_addr()?, (service_ip(Family::V4), 80).into());
        plane.apply(&complete(vec![web]))?;
        assert!(!other.exists());
        assert_eq!(socket.peer_addr()?, (service_ip(Family::V4), 80).into());
        TcpStream::connect((service_ip(Family::V4), 80))?;
        plane.remove()?;
        Ok(())
    })
}

#[test]
fn nothing_is_removed_that_is_not_a_pin_of_ours() -> Result<()> {
    let elsewhere = tempfile::tempdir()?;
    let place = Place { bpf_root: elsewhere.path().to_owned(), cgroup_root: "/".into() };
    for name in ["v1", "services-5", "services-5/g1", "sockets-5"] {
        fs::create_dir(elsewhere.path().join(name))?;
    }
    let files = ["v1/frontends", "services-5/g1/frontends", "sockets-5/origins", "link-connect4"];
    files.iter().try_for_each(|name| fs::write(elsewhere.path().join(name), "a file"))?;
    let refused = place.clear().map_err(|error| error.to_string());
    assert!(refused.is_err_and(|text| text.contains("not in a BPF file system")));
    assert!(files.iter().all(|name| elsewhere.path().join(name).exists()));

    let files = BpfFs::new()?;
    let place = Place { bpf_root: files.directory("weir")?, cgroup_root: "/".into() };
    let (ours, others) =
        (["v1/frontends", "v3/slots-next", "link-connect4", "sockets-5/seats"], ["v1/flows2", "other"]);
    for name in ours.iter().chain(&others) {
        let path = place.bpf_root.join(name);
        fs::create_dir_all(path.parent().context("a directory")?)?;
        HashMap::<_, u32, u32>::create(1, 0)?.pin(&path)?;
    }
    fs::create_dir(place.bpf_root.join("vault"))?;
    place.clear()?;
    assert!(ours.iter().all(|name| !place.bpf_root.join(name).exists()));
    assert!(others.iter().all(|name| place.bpf_root.join(name).exists()));
    assert!(place.bpf_root.join("vault").exists());
    Ok(())
}
