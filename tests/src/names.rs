//! Names as clients ask for them: queries by UDP and TCP, libc's resolver, and a real CoreDNS to compare with.
//!
//! In: a namespace, a server, a name. Out: what was answered, in words that two servers' answers can be compared by.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, Record, RecordType},
};

use crate::{
    assets,
    netns::Namespace,
    process::{Process, tail},
    wait::DEADLINE,
    wait::await_that,
};

/// How long a client waits before it asks again.
const PATIENCE: Duration = Duration::from_millis(500);

/// The query for a name.
///
/// # Errors
///
/// When it is no name.
pub fn query(name: &str, kind: RecordType, edns: bool) -> Result<Message> {
    let mut message = Message::new(0x7765, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name)?, kind));
    if edns {
        message.set_edns(Edns::new());
    }
    Ok(message)
}

/// An answer in words: the code, then its records, each section sorted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub code: ResponseCode,
    /// Whether the server calls itself authoritative.
    pub authoritative: bool,
    /// The answers, sorted.
    pub answers: Vec<String>,
    /// The additional records, sorted.
    pub additionals: Vec<String>,
    /// Which types the authority section has.
    pub authorities: Vec<RecordType>,
}

impl Said {
    fn of(message: &Message) -> Self {
        let lines = |records: &[Record]| {
            let mut lines: Vec<String> = records.iter().map(ToString::to_string).collect();
            lines.sort_unstable();
            lines
        };
        Self {
            code: message.metadata.response_code,
            authoritative: message.metadata.authoritative,
            answers: lines(&message.answers),
            additionals: lines(&message.additionals),
            authorities: message.authorities.iter().map(Record::record_type).collect(),
        }
    }

    /// The addresses answered, sorted.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let data = self.answers.iter().filter_map(|line| line.rsplit(' ').next());
        let mut addresses: Vec<IpAddr> = data.filter_map(|data| data.parse().ok()).collect();
        addresses.sort_unstable();
        addresses
    }
}

/// A socket that asks, from wherever it was made.
#[derive(Debug)]
pub struct Asker {
    socket: UdpSocket,
    server: SocketAddr,
    connected: bool,
}

impl Asker {
    /// A UDP socket in the namespace of this thread; connected ones get refusals.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn new(server: IpAddr, connected: bool) -> Result<Self> {
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let server = SocketAddr::new(server, 53);
        if connected {
            socket.connect(server)?;
        }
        Ok(Self { socket, server, connected })
    }

    /// Asks once.
    ///
    /// # Errors
    ///
    /// Without an answer, or when another server answers.
    pub fn ask(&self, message: &Message) -> Result<Message> {
        let bytes = message.to_vec()?;
        if self.connected {
            self.socket.send(&bytes)?;
        } else {
            self.socket.send_to(&bytes, self.server)?;
        }
        let mut buffer = [0; 4096];
        let (len, from) = self.socket.recv_from(&mut buffer)?;
        ensure!(from == self.server, "{from} answered instead of {}", self.server);
        let reply = Message::from_vec(&buffer[..len])?;
        ensure!(reply.metadata.id == message.metadata.id, "an answer to another question");
        Ok(reply)
    }
}

/// Asks by UDP in a namespace, as often as it takes.
///
/// # Errors
///
/// Without an answer in ten tries.
pub fn ask(namespace: &Namespace, server: IpAddr, name: &str, kind: RecordType) -> Result<Said> {
    let message = query(name, kind, true)?;
    namespace.run(|| {
        let mut last = None;
        for _ in 0..10 {
            match Asker::new(server, false)?.ask(&message) {
                Ok(reply) => return Ok(Said::of(&reply)),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("never asked")?).with_context(|| format!("{name} {kind} of {server}"))
    })
}

/// Asks by TCP in a namespace.
///
/// # Errors
///
/// Without an answer.
pub fn ask_by_tcp(namespace: &Namespace, server: IpAddr, name: &str, kind: RecordType) -> Result<Said> {
    let bytes = query(name, kind, false)?.to_vec()?;
    namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(server, 53), DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(&u16::try_from(bytes.len())?.to_be_bytes())?;
        stream.write_all(&bytes)?;
        let mut len = [0; 2];
        stream.read_exact(&mut len)?;
        let mut reply = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut reply)?;
        Ok(Said::of(&Message::from_vec(&reply)?))
    })
}

/// The addresses that libc's resolver finds for a name where `/etc/resolv.conf` names this server, sorted. No
/// address is no error.
///
/// # Errors
///
/// When there is no `unshare` or `getent`.
pub fn libc_resolves(namespace: &Namespace, server: IpAddr, name: &str) -> Result<Vec<IpAddr>> {
    let file = tempfile::NamedTempFile::new()?;
    let search = "default.svc.cluster.local svc.cluster.local cluster.local";
    std::fs::write(
        file.path(),
        format!("nameserver {server}\nsearch {search}\noptions ndots:5 timeout:2 attempts:3\n"),
    )?;
    let script = format!(
        "mount --bind {} /etc/resolv.conf && mount --bind /dev/null /etc/hosts && getent -s dns ahosts {name}",
        file.path().display()
    );
    let output = namespace.output("unshare", &["-m", "sh", "-c", &script])?;
    // 2 is getent's for a name that is not found.
    let code = output.status.code();
    ensure!(matches!(code, Some(0 | 2)), "getent: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let mut found: Vec<IpAddr> =
        text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// A running CoreDNS. Dropping it kills it.
#[derive(Debug)]
pub struct CoreDns {
    process: Process,
    directory: tempfile::TempDir,
}

impl CoreDns {
    /// Starts it in a namespace, with the lines of one server block for everything on port 53, and waits until it listens.
    ///
    /// # Errors
    ///
    /// When `cargo xtask setup` has not built it.
    ///
    /// # Panics
    ///
    /// When it does not come up in time.
    pub fn start(namespace: &Namespace, block: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-coredns-").tempdir()?;
        let corefile = directory.path().join("Corefile");
        std::fs::write(&corefile, format!(".:53 {{\n{block}\n}}\n"))?;
        let log = directory.path().join("log");
        let process = namespace.launch(&assets::kubernetes("coredns")?, &log, |command| {
            command.arg("-conf").arg(&corefile);
        })?;
        let started = Self { process, directory };
        // It writes its version once its sockets are there.
        await_that("CoreDNS listens", || started.log().contains("CoreDNS-"));
        Ok(started)
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log(&self) -> String {
        tail(self.process.log_file())
    }

    /// Where its files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// Starts a weir that answers names on a node in a namespace, with these arguments besides `run --dns`; it logs to a file in
/// `directory`.
///
/// # Errors
///
/// When there is no weir.
pub fn start_weir(namespace: &Namespace, directory: &Path, arguments: &[String]) -> Result<Process> {
    launch(namespace, &assets::weir()?, directory, arguments, |_| {})
}

/// The same in a mount namespace of its own, in which a script runs first.
///
/// # Errors
///
/// When there is no weir or no `unshare`.
pub fn start_weir_behind(
    script: &str,
    namespace: &Namespace,
    directory: &Path,
    arguments: &[String],
) -> Result<Process> {
    let script = format!("{script}; exec {} \"$@\"", assets::weir()?.display());
    launch(namespace, Path::new("unshare"), directory, arguments, |command| {
        command.args(["--mount", "sh", "-ec", &script, "sh"]);
    })
}

fn launch(
    namespace: &Namespace,
    program: &Path,
    directory: &Path,
    arguments: &[String],
    first: impl FnOnce(&mut std::process::Command),
) -> Result<Process> {
    namespace.launch(program, &directory.join("weir.log"), |command| {
        first(command);
        command.args(["run", "--dns"]).args(arguments);
    })
}
