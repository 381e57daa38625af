//! The command line: what is measured, and how.

use std::{path::PathBuf, time::Duration};

use clap::Parser;

use super::{
    dns,
    paths::{self, Load, Route, Traffic},
    programming,
    subject::Subject,
    workload::Workload,
};

/// Measures how fast Services are programmed and reached: weir's data planes beside kube-proxy's.
///
/// A full run, without --only, --quick and --subject, takes under 90 minutes on two cores and writes its page: docs/benchmarks/DATE with
/// README.md, samples.json and plots. With five subjects it is about an hour: programming 40 minutes (6 to 10 for each number of Services), packet
/// paths 10, hostile acts 8, maps and names 2.
///
/// KUBEBUILDER_ASSETS names a directory with etcd and kube-apiserver; kube-proxy is there or in PATH. WEIR_BIN names a release build of
/// weir. `cargo xtask bench` sets all of them.
///
/// Every case has a name: `maps`, `programming/SERVICESxENDPOINTS`, `hostile/SERVICESxENDPOINTS`, `paths/SERVICES/ROUTE/TRAFFIC/FAMILY`,
/// `hooks/SERVICES`, `dns`. `--only` picks by parts of names.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Options {
    /// What to measure; without this all that the machine can run: weir-ebpf, weir-nftables, kube-proxy-nftables, kube-proxy-iptables,
    /// kube-proxy-ipvs, and the kube-proxy of a later Kubernetes that setup built. weir-ebpf@PATH and weir-nftables@PATH are another build
    /// of weir, so that before and after are in one run, and kube-proxy-nftables@PATH is another kube-proxy.
    #[arg(long = "subject", value_name = "SUBJECT[@PATH]", value_delimiter = ',')]
    pub(super) subjects: Vec<Subject>,
    /// Measure only cases with this in their name; several times for more.
    #[arg(long, value_name = "PART_OF_A_NAME")]
    pub(super) only: Vec<String>,
    /// Under 5 minutes: few rounds, at most 1000 Services, IPv6 by one route, no hostile acts.
    #[arg(long)]
    pub(super) quick: bool,
    /// Print the names of the cases and measure none.
    #[arg(long)]
    pub(super) list: bool,
    /// Programming: numbers of Services.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 10_000, 50_000])]
    pub(super) services: Vec<u32>,
    /// Programming: endpoints of the one Service with many; 0 leaves it out.
    #[arg(long, default_value_t = 10_000)]
    pub(super) wide: u32,
    /// Programming, hostile acts and maps: how often each subject is started for each number of Services.
    #[arg(long, default_value_t = 1)]
    pub(super) rounds: u32,
    /// Programming: changes of each kind after each start.
    #[arg(long, default_value_t = 5)]
    pub(super) changes: u32,
    /// Programming: changes of each kind while others go on.
    #[arg(long, default_value_t = 10)]
    pub(super) busy_changes: u32,
    /// Programming: how many others in a second.
    #[arg(long, default_value_t = 100)]
    pub(super) churn: u32,
    /// Programming: the most seconds for the start, for each change, for the restart, and after a hostile act; no further change is begun
    /// after so many either.
    #[arg(long, default_value_t = 75)]
    pub(super) bound: u64,
    /// Hostile acts: numbers of Services.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000])]
    pub(super) hostile_services: Vec<u32>,
    /// Hostile acts: leave out the act that takes most of a minute for each subject, which is waiting for connections that fell silent.
    #[arg(long)]
    pub(super) short_acts: bool,
    /// Maps: the number of Services.
    #[arg(long, default_value_t = 50_000)]
    pub(super) map_services: u32,
    /// Paths: numbers of Services.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 10_000])]
    pub(super) path_services: Vec<u32>,
    /// Paths: the number of Services that everything is measured with; with others only connecting is. Where it is none of those, the first
    /// is taken.
    #[arg(long, default_value_t = 10)]
    pub(super) path_all: u32,
    /// Paths: how often each way takes its turn for each kind of traffic.
    #[arg(long, default_value_t = 10)]
    pub(super) path_rounds: u32,
    /// Paths: how long a turn is, in milliseconds.
    #[arg(long, default_value_t = 60)]
    pub(super) path_slot: u64,
    /// The file that samples are written to.
    #[arg(long, default_value = "bench.json")]
    pub(super) output: PathBuf,
    /// Profile weir's agent while it is measured (needs perf): folded stacks and the time of its programs go into this directory.
    #[arg(long, value_name = "DIRECTORY", num_args = 0..=1, default_missing_value = "bench-profile")]
    pub(super) profile: Option<PathBuf>,
    /// Measure nothing: write page and plots of these samples.
    #[arg(long, value_name = "SAMPLES")]
    pub(super) render: Option<PathBuf>,
    /// The directory of `benchmarks.md`, and of `benchmarks/DATE` for each run.
    #[arg(long, default_value = "docs")]
    pub(super) docs: PathBuf,
}

/// The name of the case about answers to names.
pub(super) const NAMES: &str = "dns";

impl Options {
    /// With what `--quick` leaves.
    #[must_use]
    pub(super) fn settled(&self) -> Self {
        let sorted = |numbers: &[u32]| {
            let mut numbers = numbers.to_vec();
            numbers.sort_unstable();
            numbers.dedup();
            numbers
        };
        let mut settled = Self {
            services: sorted(&self.services),
            hostile_services: sorted(&self.hostile_services),
            path_services: sorted(&self.path_services),
            ..self.clone()
        };
        if !settled.path_services.contains(&settled.path_all)
            && let Some(first) = settled.path_services.first()
        {
            settled.path_all = *first;
        }
        if settled.quick {
            settled.services.retain(|services| *services <= 1000);
            settled.wide = 0;
            settled.rounds = 1;
            settled.changes = settled.changes.min(1);
            settled.busy_changes = settled.busy_changes.min(2);
            settled.bound = settled.bound.min(15);
            settled.hostile_services.clear();
            settled.map_services = settled.map_services.min(5000);
            settled.path_services = vec![100];
            settled.path_all = 100;
            settled.path_rounds = settled.path_rounds.min(4);
            settled.path_slot = settled.path_slot.min(30);
        }
        settled
    }

    /// Whether all is measured, so that there is a page about it.
    #[must_use]
    pub(super) fn is_full(&self) -> bool {
        self.only.is_empty() && self.subjects.is_empty() && !self.quick
    }

    /// The command line, to be repeated.
    #[must_use]
    pub(super) fn command_line(&self) -> Vec<String> {
        std::env::args().skip(1).collect()
    }

    /// Changes to measure are cheap without an API server.
    #[must_use]
    pub(super) fn map_changes(&self) -> u32 {
        self.changes * 100
    }

    /// The workloads to program, the Service with many endpoints first.
    #[must_use]
    pub(super) fn workloads(&self) -> Vec<Workload> {
        let wide = (self.wide > 0).then(|| Workload::wide(self.wide));
        let all = wide.into_iter().chain(self.services.iter().copied().map(Workload::many));
        all.filter(|workload| self.selection().has(&format!("programming/{workload}"))).collect()
    }

    /// The workloads during hostile acts.
    #[must_use]
    pub(super) fn hostile(&self) -> Vec<Workload> {
        let all = self.hostile_services.iter().copied().map(Workload::many);
        all.filter(|workload| self.selection().has(&format!("hostile/{workload}"))).collect()
    }

    /// The cases to measure.
    #[must_use]
    pub(super) fn selection(&self) -> Selection {
        Selection { only: self.only.clone(), path_all: self.path_all, quick: self.quick }
    }

    /// How programming is measured.
    #[must_use]
    pub(super) fn programming(&self) -> programming::Plan {
        programming::Plan {
            rounds: self.rounds,
            changes: self.changes,
            busy_changes: self.busy_changes,
            churn: self.churn,
            bound: Duration::from_secs(self.bound),
        }
    }

    /// How paths are measured.
    #[must_use]
    pub(super) fn paths(&self) -> paths::Plan {
        paths::Plan {
            rounds: self.path_rounds,
            slot: Duration::from_millis(self.path_slot),
            selection: self.selection(),
        }
    }

    /// How names are measured.
    #[must_use]
    pub(super) fn dns(&self) -> dns::Plan {
        dns::Plan {
            rounds: self.rounds,
            turn: Duration::from_millis(self.path_slot * 50),
            changes: self.changes * 3,
        }
    }

    /// The names of all cases that would be measured.
    #[must_use]
    pub(super) fn names(&self) -> Vec<String> {
        let selection = self.selection();
        let maps = selection.has("maps").then(|| "maps".to_owned());
        let mut names: Vec<String> = maps.into_iter().collect();
        names.extend(self.workloads().iter().map(|workload| format!("programming/{workload}")));
        names.extend(self.hostile().iter().map(|workload| format!("hostile/{workload}")));
        for &services in &self.path_services {
            let cases = selection.cases(services).into_iter();
            names.extend(cases.map(|(route, load)| case(services, route, load)));
            names.extend(selection.hooks(services).then(|| hooks(services)));
        }
        names.extend(selection.has(NAMES).then(|| NAMES.to_owned()));
        names
    }
}

fn case(services: u32, route: Route, load: Load) -> String {
    format!("paths/{services}/{}/{load}", route.id())
}

fn hooks(services: u32) -> String {
    format!("hooks/{services}")
}

/// Which cases are measured.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    only: Vec<String>,
    path_all: u32,
    quick: bool,
}

impl Selection {
    /// Whether `--only` picks it.
    #[must_use]
    pub(super) fn has(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// Whether the socket programs are timed with so many Services.
    #[must_use]
    pub(super) fn hooks(&self, services: u32) -> bool {
        self.has(&hooks(services))
    }

    /// The cases of traffic with so many Services.
    #[must_use]
    pub(super) fn cases(&self, services: u32) -> Vec<(Route, Load)> {
        let loads = |route: Route| {
            Load::ALL.into_iter().filter(move |load| route.takes(*load)).map(move |load| (route, load))
        };
        let all = Route::ALL.into_iter().flat_map(loads);
        all.filter(|(route, load)| services == self.path_all || counts_at_any_number(*route, *load))
            .filter(|(route, load)| !self.quick || is_quick(*route, *load))
            .filter(|(route, load)| self.has(&case(services, *route, *load)))
            .collect()
    }
}

/// Whether this load shows that a path depends on the number of Services: connections are what looks Services
/// up.
fn counts_at_any_number(route: Route, load: Load) -> bool {
    matches!(route, Route::PodSameNode | Route::NodePortLocal | Route::NodePortRemote)
        && load == Load::alone(Traffic::Connect, false)
}

fn is_quick(route: Route, load: Load) -> bool {
    let few = load.traffic != Traffic::Packets && load.traffic != Traffic::Datagram;
    few && (!load.v6 || (route == Route::PodSameNode && load.traffic == Traffic::Connect))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &str) -> Options {
        let words = std::iter::once("weir-bench").chain(arguments.split_whitespace());
        Options::try_parse_from(words).unwrap().settled()
    }

    #[test]
    fn only_picks_cases_by_parts_of_their_names() {
        let names =
            options("--only nodeport-remote/connect --only programming/100x --path-services 1000").names();
        let expected = [
            "programming/100x5",
            "paths/1000/nodeport-remote/connect/IPv4",
            "paths/1000/nodeport-remote/connect/IPv6",
            "paths/1000/nodeport-remote/connect/16/IPv4",
        ];
        assert_eq!(names, expected);
        assert!(options("--only nothing-like-it").names().is_empty());
    }

    #[test]
    fn all_is_measured_with_one_number_of_services_and_connecting_with_every() {
        let names = options("").names();
        let of = |prefix: &str| names.iter().filter(|name| name.starts_with(prefix)).count();
        assert!(of("paths/10/") > 60 && of("paths/10000/") == 3, "{names:?}");
        assert_eq!((of("programming/"), of("programming/1x10000"), of("maps")), (5, 1, 1));
        assert_eq!((of("hostile/"), of("hostile/10000x5")), (1, 1));
    }

    #[test]
    fn quick_is_a_part_of_all() {
        let all = options("--path-services 100 --path-all 100").names();
        let quick = options("--quick").names();
        assert!(quick.len() < all.len() && quick.len() > 30, "{}", quick.len());
        assert!(quick.iter().filter(|name| name.starts_with("paths")).all(|name| all.contains(name)));
    }
}
