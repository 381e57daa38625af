//! The watch on this host's addresses, on real interfaces in a namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{net::IpAddr, process::Command, thread, time::Duration};

use nix::sched::{CloneFlags, unshare};
use tokio::sync::watch;

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}: {status}");
}

async fn next(addresses: &mut watch::Receiver<Vec<IpAddr>>) -> Vec<String> {
    tokio::time::timeout(Duration::from_secs(10), addresses.changed()).await.expect("no news").unwrap();
    let current = addresses.borrow_and_update();
    assert!(current.is_sorted());
    current.iter().map(ToString::to_string).collect()
}

/// Runs `case` in a fresh network namespace with one interface, `w0`, that is up and has no address.
fn in_namespace(case: impl AsyncFnOnce() + Send + 'static) {
    let inside = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
        ip("link set lo up");
        ip("link add w0 type bridge");
        ip("link set w0 addrgenmode none");
        ip("link set w0 up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(case());
    };
    thread::spawn(inside).join().unwrap();
}

#[test]
fn the_list_comes_first_and_then_each_change_without_loopback_r13_r14() {
    in_namespace(async || {
        ip("addr add 192.0.2.9/24 dev w0");
        let (tx, mut addresses) = watch::channel(Vec::new());
        let watching = tokio::spawn(weir::source::host::watch(tx));
        assert_eq!(next(&mut addresses).await, ["192.0.2.9"]);

        ip("addr add 2001:db8::9/64 dev w0 nodad");
        assert_eq!(next(&mut addresses).await, ["192.0.2.9", "2001:db8::9"]);

        // Ours is the local end of a point-to-point address, and an address on `lo` outside 127/8 is an address.
        ip("addr add 198.51.100.1 peer 198.51.100.2 dev w0");
        assert_eq!(next(&mut addresses).await, ["192.0.2.9", "198.51.100.1", "2001:db8::9"]);
        ip("addr add 203.0.113.5/32 dev lo");
        assert_eq!(next(&mut addresses).await, ["192.0.2.9", "198.51.100.1", "203.0.113.5", "2001:db8::9"]);

        ip("link del w0");
        loop {
            // The addresses of a device go one after another.
            if next(&mut addresses).await == ["203.0.113.5"] {
                break;
            }
        }
        drop(addresses);
        tokio::time::timeout(Duration::from_secs(10), watching).await.expect("still watching").unwrap();
    });
}

#[test]
fn a_host_without_addresses_is_reported_once() {
    in_namespace(async || {
        let (tx, mut addresses) = watch::channel(Vec::new());
        tokio::spawn(weir::source::host::watch(tx));
        assert!(next(&mut addresses).await.is_empty());
    });
}

#[test]
fn lost_news_is_made_good_by_reading_again() {
    in_namespace(async || {
        let (tx, mut addresses) = watch::channel(Vec::new());
        tokio::spawn(weir::source::host::watch(tx));
        next(&mut addresses).await;
        // Nothing is read meanwhile, since this runtime has one thread: the socket's buffer overflows.
        let mut batch = String::new();
        for number in 0..8000 {
            batch.push_str(&format!("addr add 10.9.{}.{}/32 dev w0\n", number / 250, number % 250 + 1));
        }
        let mut child =
            Command::new("ip").args(["-batch", "-"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), batch.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        while next(&mut addresses).await.len() < 8000 {}
    });
}
