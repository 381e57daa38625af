//! Rates as a table.

use std::collections::BTreeMap;

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
    for ((services, load), ways) in &groups {
        let bare = ways.get(&(None, Way::Straight));
        for ((subject, _), service) in ways.iter().filter(|((_, way), _)| *way == Way::Service) {
            let straight = ways.get(&(*subject, Way::Straight));
            table.add_row([
                services.to_string(),
                load.traffic.name().to_owned(),
                load.clients.to_string(),
                if load.v6 { "IPv6" } else { "IPv4" }.to_owned(),
                subject.map_or("", Subject::name).to_owned(),
                rate(straight),
                rate(Some(service)),
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

fn rate(samples: Option<&Rates<'_>>) -> String {
    let rates = samples.into_iter().flat_map(BTreeMap::values).map(|sample| sample.rate);
    format!("{:.0}", quantile(rates.collect(), 0.5))
}

fn ratio(of: &Rates<'_>, to: Option<&Rates<'_>>) -> String {
    let Some(to) = to else { return "-".to_owned() };
    let ratios = of.iter().filter_map(|(round, sample)| Some(sample.rate / to.get(round)?.rate));
    let Estimate { point, low, high } = estimate(&ratios.collect::<Vec<_>>());
    format!("{point:.3} ({low:.3} to {high:.3})")
}
