//! Rates as a table.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};

use super::{Load, Sample, Way};
use crate::bench::{
    statistics::{Estimate, estimate, quantile},
    subject::Subject,
};

/// The samples of one way, by round.
type Rates<'a> = BTreeMap<u32, &'a Sample>;

/// The samples of each way, with and without a subject.
type Ways<'a> = BTreeMap<(Option<Subject>, Way), Rates<'a>>;

/// One row for each number of Services, kind of traffic and subject.
#[must_use]
pub(in crate::bench) fn table(samples: &[Sample]) -> Table {
    let mut groups: BTreeMap<(u32, Load), Ways<'_>> = BTreeMap::new();
    for sample in samples {
        let ways = groups.entry((sample.services, sample.load)).or_default();
        ways.entry((sample.subject, sample.way)).or_default().insert(sample.round, sample);
    }
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "Services",
        "traffic",
        "clients",
        "",
        "subject",
        "straight /s",
        "ClusterIP /s",
        "to straight (95 %)",
        "to straight without any proxy (95 %)",
    ]);
    let subjects: BTreeSet<Option<Subject>> = samples.iter().map(|sample| sample.subject).collect();
    for ((services, load), ways) in &groups {
        let bare = ways.get(&(None, Way::Straight));
        for subject in subjects.iter().filter(|subject| subject.is_some()) {
            let (straight, service) =
                (ways.get(&(*subject, Way::Straight)), ways.get(&(*subject, Way::Service)));
            table.add_row([
                services.to_string(),
                load.traffic.name().to_owned(),
                load.clients.to_string(),
                if load.v6 { "IPv6" } else { "IPv4" }.to_owned(),
                subject.map_or("", Subject::name).to_owned(),
                rate(straight),
                rate(service),
                ratio(service, straight),
                ratio(service, bare),
            ]);
        }
    }
    for column in table.column_iter_mut().filter(|column| ![1, 3, 4].contains(&column.index)) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The median; subjects that were not loaded with so many Services have none.
fn rate(samples: Option<&Rates<'_>>) -> String {
    let Some(samples) = samples else { return "not loaded".to_owned() };
    format!("{:.0}", quantile(samples.values().map(|sample| sample.rate).collect(), 0.5))
}

fn ratio(of: Option<&Rates<'_>>, to: Option<&Rates<'_>>) -> String {
    let Some((of, to)) = of.zip(to) else { return "-".to_owned() };
    let ratios = of.iter().filter_map(|(round, sample)| Some(sample.rate / to.get(round)?.rate));
    let Estimate { point, low, high } = estimate(&ratios.collect::<Vec<_>>());
    format!("{point:.3} ({low:.3} to {high:.3})")
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Load, client::Traffic},
        *,
    };

    fn sample(services: u32, round: u32, subject: Option<Subject>, way: Way, rate: f64) -> Sample {
        let load = Load { traffic: Traffic::Connect, clients: 1, v6: false };
        Sample { services, load, round, subject, way, rate }
    }

    #[test]
    fn ratios_are_of_one_round_and_who_was_not_loaded_is_shown_so() {
        let (weir, peer) = (Some(Subject::WeirEbpf), Some(Subject::KubeProxy));
        let mut samples = Vec::new();
        for (round, speed) in [(0, 1000.0), (1, 500.0)] {
            samples.push(sample(10, round, weir, Way::Straight, speed));
            samples.push(sample(10, round, weir, Way::Service, 0.9 * speed));
            samples.push(sample(10, round, None, Way::Straight, 2.0 * speed));
        }
        samples.push(sample(5, 0, peer, Way::Straight, 1.0));
        samples.push(sample(5, 0, peer, Way::Service, 1.0));
        let text = table(&samples).to_string();
        let row = |services: &str, name: &str| {
            let found = text.lines().find(|line| line.contains(services) && line.contains(name));
            found.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
        };
        let ours = row(" 10 ", "weir ebpf");
        assert!(ours.contains("0.900 (0.900 to 0.900)") && ours.contains("0.450 (0.450 to 0.450)"), "{ours}");
        assert!(row(" 10 ", "kube-proxy").contains("not loaded"));
    }
}
