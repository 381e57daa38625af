//! Network namespaces that vanish with their owner.
//!
//! In: closures and commands. Out: the same, run inside a namespace. A namespace is held by a thread and a file, not by
//! a name, so nothing is left behind however the process ends; [`Namespace::publish`] adds a name for `ip netns exec`.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsRawFd as _,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    cgroup::Cgroup,
    process::{ChildGuard, Process},
};

/// Where `ip netns` looks for names.
const NAMES: &str = "/run/netns";

/// A network namespace of its own. Dropping it removes it once no process runs in it.
#[derive(Debug)]
pub struct Namespace {
    label: String,
    file: File,
    cgroup: Option<Cgroup>,
    guard: ChildGuard,
    name: Option<PathBuf>,
}

impl Namespace {
    /// Makes a namespace with a working loopback device and IPv6 addresses usable at once.
    ///
    /// # Errors
    ///
    /// Without the privilege to make network namespaces.
    pub fn new(label: &str) -> Result<Self> {
        Self::made(label, None)
    }

    /// [`Namespace::new`] with its threads and programs in a control group too.
    ///
    /// # Errors
    ///
    /// As [`Namespace::new`], and when the group cannot be entered.
    pub fn within(cgroup: &Cgroup, label: &str) -> Result<Self> {
        Self::made(label, Some(cgroup.clone()))
    }

    fn made(label: &str, cgroup: Option<Cgroup>) -> Result<Self> {
        let door = cgroup.as_ref().map(Cgroup::door).transpose()?;
        let (guard, file) = ChildGuard::start(label, move || {
            door.map_or(Ok(()), |door| door.enter()).context("cannot enter a control group")?;
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace; this needs root")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        })?;
        let namespace = Self { label: label.to_owned(), file, cgroup, guard, name: None };
        for (key, value) in SYSCTLS {
            namespace.sysctl(key, value)?;
        }
        for (key, value) in NEWER_SYSCTLS {
            // Older kernels have these once for the whole machine, and better values there.
            let _ = namespace.sysctl(key, value);
        }
        namespace.ip(&["link set lo up".to_owned()])?;
        Ok(namespace)
    }

    /// The namespace's name in messages.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// A path other processes can open to name this namespace, as `ip link … netns PATH` does.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Gives the namespace a name for `ip netns exec`, until it is dropped.
    ///
    /// # Errors
    ///
    /// When the name is taken or cannot be made.
    pub fn publish(&mut self, name: &str) -> Result<()> {
        std::fs::create_dir_all(NAMES)?;
        let path = Path::new(NAMES).join(name);
        File::create_new(&path).with_context(|| {
            format!("cannot make {}; if it is left over, `ip netns del {name}`", path.display())
        })?;
        mount(Some(self.path().as_str()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("cannot name a namespace {}", path.display()))?;
        self.name = Some(path);
        Ok(())
    }

    /// Runs `work` on a thread inside the namespace and waits for it. Panics go on in the caller.
    ///
    /// # Panics
    ///
    /// When the namespace cannot be entered, or `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                work()
            });
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Starts a thread inside the namespace that may outlive the caller.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    ///
    /// # Panics
    ///
    /// On the new thread, when the namespace cannot be entered.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<T>> {
        let door = self.cgroup.as_ref().map(Cgroup::door).transpose()?;
        self.start(move || door.map_or(Ok(()), |door| door.enter()), work)
    }

    /// [`Namespace::thread`] outside the namespace's control group: programs attached there do not see the thread's
    /// sockets, so packets are all that serves it.
    ///
    /// # Errors
    ///
    /// When no thread can be started.
    ///
    /// # Panics
    ///
    /// On the new thread, when the namespace cannot be entered.
    pub fn thread_outside_group<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<T>> {
        self.start(|| Ok(()), work)
    }

    fn start<T: Send + 'static>(
        &self,
        group: impl FnOnce() -> io::Result<()> + Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<T>> {
        let file = self.file.try_clone()?;
        let label = self.label.clone();
        let inside = move || {
            enter(&file, group(), &label);
            work()
        };
        Ok(thread::Builder::new().name(format!("in-{}", self.label)).spawn(inside)?)
    }

    fn enter(&self) {
        enter(&self.file, self.cgroup.as_ref().map_or(Ok(()), Cgroup::enter), &self.label);
    }

    /// The control group of its threads and programs, if they have one.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Starts a program inside the namespace. The kernel kills it should this process die or the namespace be dropped.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub fn spawn(&self, program: &Path, prepare: impl FnOnce(&mut Command)) -> Result<Child> {
        self.guard.spawn(program, prepare)
    }

    /// [`Namespace::spawn`] with everything that the program writes added to the file `log`.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub fn launch(&self, program: &Path, log: &Path, prepare: impl FnOnce(&mut Command)) -> Result<Process> {
        self.guard.launch(program, log, prepare)
    }

    /// Runs a program inside the namespace to its end.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<Output> {
        self.run(|| Command::new(program).args(args).stdin(Stdio::null()).output())
            .with_context(|| format!("cannot run {program} in {}", self.label))
    }

    /// Runs a program inside the namespace and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it cannot be started or fails; the message holds what it complained about.
    pub fn stdout(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.output(program, args)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{program} {} in {}: {}",
            args.join(" "),
            self.label,
            complaint.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a sysctl of this namespace, named by its path below /proc/sys.
    ///
    /// # Errors
    ///
    /// When the kernel has no such setting or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| std::fs::write(Path::new("/proc/sys").join(key), value))
            .with_context(|| format!("cannot set {key} to {value} in {}", self.label))
    }

    /// When a line fails. The lines after it do not run.
    ///
    /// # Errors
    ///
    /// When a line fails; none after it is run.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        let mut child = self
            .run(|| {
                let mut ip = Command::new("ip");
                ip.args(["-batch", "-"])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
            })
            .context("cannot run ip (package iproute2)")?;
        let script = lines.join("\n") + "\n";
        child.stdin.take().context("ip takes no input")?.write_all(script.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("ip in {}: {}\n{script}", self.label, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}

/// Moves the calling thread into a namespace, after it went into the namespace's group.
fn enter(file: &File, grouped: io::Result<()>, label: &str) {
    assert!(grouped.is_ok(), "cannot enter the control group of {label}: {grouped:?}");
    assert_eq!(setns(file, CloneFlags::CLONE_NEWNET), Ok(()), "cannot enter namespace {label}");
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(path) = self.name.take() {
            // Best effort: a drop has no caller to report to, and `ip netns del` remains.
            let _ = umount2(&path, MntFlags::MNT_DETACH);
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Forwarding like a node's, no waiting for address detection, and every ICMP error sent, however many there were:
/// a rejected connection shows as nothing else.
const SYSCTLS: [(&str, &str); 15] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_redirects", "0"),
    ("net/ipv6/conf/default/accept_redirects", "0"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/icmp_ratelimit", "0"),
    ("net/ipv6/icmp/ratelimit", "0"),
    ("net/ipv4/ping_group_range", "0 0"),
];

/// The same for kernels that count the errors of each namespace.
const NEWER_SYSCTLS: [(&str, &str); 2] =
    [("net/ipv4/icmp_msgs_per_sec", "1000000"), ("net/ipv4/icmp_msgs_burst", "1000000")];
