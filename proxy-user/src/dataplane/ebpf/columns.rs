//! Which frontends of a service port share a column of its record.
//!
//! In: how each frontend is treated, and the column it has in the maps. Out: columns. A frontend keeps its column for as
//! long as its neighbours there are treated as it is, so that a change of the port changes no frontend.

use proxy_ebpf::{Column, Record, verdict};

use crate::plan::{Route, Target, Treatment};

/// The columns of a record, and which frontend has which.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Columns {
    pub(super) columns: [Column; Record::COLUMNS],
    /// Of each frontend, in the order they came in. Without one it is left to the packets.
    pub(super) of: Vec<Option<u32>>,
}

impl Columns {
    /// Gives each frontend a column: `frontends` are their routes and the columns they have.
    pub(super) fn assign(frontends: &[(Route, Option<u32>)]) -> Self {
        let mut taken: [Option<Column>; Record::COLUMNS] = [None; Record::COLUMNS];
        let mut of = vec![None; frontends.len()];
        for ((route, known), place) in frontends.iter().zip(&mut of) {
            let Some(known) = known else { continue };
            let Some(there) = taken.get_mut(*known as usize) else { continue };
            if *there.get_or_insert(column(route)) == column(route) {
                *place = Some(*known);
            }
        }
        for ((route, _), place) in frontends.iter().zip(&mut of).filter(|(_, place)| place.is_none()) {
            let wanted = Some(column(route));
            let same = taken.iter().position(|there| *there == wanted);
            let Some(index) = same.or_else(|| taken.iter().position(Option::is_none)) else { continue };
            taken[index] = wanted;
            *place = u32::try_from(index).ok();
        }
        Self { columns: taken.map(Option::unwrap_or_default), of }
    }
}

fn column(route: &Route) -> Column {
    Column { pod: verdict(route.pod), host: verdict(route.host), outside: verdict(route.outside), zero: 0 }
}

fn verdict(treatment: Treatment) -> u8 {
    let masquerade = if treatment.masquerade { verdict::MASQUERADE } else { 0 };
    masquerade
        | match treatment.target {
            Target::Cluster => verdict::CLUSTER,
            Target::Local => verdict::LOCAL,
            Target::Reject => verdict::REFUSE,
            Target::Drop => verdict::DROP,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(target: Target) -> Route {
        Route::uniform(Treatment { target, masquerade: false })
    }

    #[test]
    fn frontends_that_are_treated_alike_share_a_column() {
        let [cluster, local] = [Target::Cluster, Target::Local].map(route);
        let columns = Columns::assign(&[(cluster, None), (local, None), (cluster, None)]);
        assert_eq!(columns.of, [Some(0), Some(1), Some(0)]);
        assert_eq!(columns.columns[0], Column { pod: 4, host: 4, outside: 4, zero: 0 });
        assert_eq!(columns.columns[1], Column { pod: 5, host: 5, outside: 5, zero: 0 });
    }

    #[test]
    fn a_frontend_keeps_its_column_whatever_becomes_of_the_route() {
        let refuse = route(Target::Reject);
        let columns = Columns::assign(&[(refuse, Some(1)), (refuse, Some(3)), (refuse, None)]);
        assert_eq!(columns.of, [Some(1), Some(3), Some(1)]);
    }

    #[test]
    fn of_two_in_a_column_that_part_the_first_keeps_it() {
        let [cluster, local] = [Target::Cluster, Target::Local].map(route);
        let columns = Columns::assign(&[(cluster, Some(2)), (local, Some(2))]);
        assert_eq!(columns.of, [Some(2), Some(0)]);
    }

    #[test]
    fn one_too_many_is_left_to_the_packets() {
        let treatments = [Target::Cluster, Target::Local, Target::Reject, Target::Drop];
        let mut frontends: Vec<_> = treatments.map(|target| (route(target), None)).to_vec();
        let masqueraded = Treatment { target: Target::Cluster, masquerade: true };
        frontends.push((Route::uniform(masqueraded), None));
        let columns = Columns::assign(&frontends);
        assert_eq!(columns.of, [Some(0), Some(1), Some(2), Some(3), None]);
    }
}
