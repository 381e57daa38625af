//! Assigns a column of the record to each frontend of a service port.
//!
//! In: the route of each frontend, and the column that it has in the maps. Out: columns. A frontend keeps its
//! column as long as the others of the column have the same route, so that a change of the port changes no
//! frontend.

use proxy_ebpf::{Column, Record, verdict};

use crate::plan::{Route, Target, Treatment};

/// The columns of a record, and the column of each frontend.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Columns {
    pub(super) columns: [Column; Record::COLUMNS],
    /// In the order of the frontends. A frontend without a column is left to nftables.
    pub(super) of: Vec<Option<u32>>,
}

impl Columns {
    /// Assigns columns. `frontends` are the routes and the present columns.
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
    fn frontends_with_the_same_route_share_a_column() {
        let [cluster, local] = [Target::Cluster, Target::Local].map(route);
        let columns = Columns::assign(&[(cluster, None), (local, None), (cluster, None)]);
        assert_eq!(columns.of, [Some(0), Some(1), Some(0)]);
        assert_eq!(columns.columns[0], Column { pod: 4, host: 4, outside: 4, zero: 0 });
        assert_eq!(columns.columns[1], Column { pod: 5, host: 5, outside: 5, zero: 0 });
    }

    #[test]
    fn a_frontend_keeps_its_column_when_the_route_changes() {
        let refuse = route(Target::Reject);
        let columns = Columns::assign(&[(refuse, Some(1)), (refuse, Some(3)), (refuse, None)]);
        assert_eq!(columns.of, [Some(1), Some(3), Some(1)]);
    }

    #[test]
    fn of_two_frontends_whose_routes_become_different_the_first_keeps_the_column() {
        let [cluster, local] = [Target::Cluster, Target::Local].map(route);
        let columns = Columns::assign(&[(cluster, Some(2)), (local, Some(2))]);
        assert_eq!(columns.of, [Some(2), Some(0)]);
    }

    #[test]
    fn a_fifth_route_is_left_to_nftables() {
        let treatments = [Target::Cluster, Target::Local, Target::Reject, Target::Drop];
        let mut frontends: Vec<_> = treatments.map(|target| (route(target), None)).to_vec();
        let masqueraded = Treatment { target: Target::Cluster, masquerade: true };
        frontends.push((Route::uniform(masqueraded), None));
        let columns = Columns::assign(&frontends);
        assert_eq!(columns.of, [Some(0), Some(1), Some(2), Some(3), None]);
    }
}
