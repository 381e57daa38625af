//! The generations of the maps of Services, and which of them serves.
//!
//! In: a directory, and what the attached programs use. Out: the generation to go on with.
//!
//! Maps grow by a new generation: a directory of its own, in which those that stay are pinned too. It serves when programs
//! that use it are attached, and `current` leads to it from then on. An agent that is killed on the way leaves programs of
//! both, or a name that leads to the wrong one, so the next agent goes by what programs use: their links are switched
//! when the generation is filled, not before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use super::{
    files::Files,
    named::{pinned_in, used_by_programs},
    place::{Place, numbered},
    problem::Problem,
    sizes::SERVICES,
};

/// The directory of all generations.
pub(super) struct Generations(PathBuf);

/// Which generation serves.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Serving {
    /// The newest that an attached program uses, or else the one that is published.
    pub(super) generation: Option<u32>,
    /// Whether attached programs use maps of some generation.
    pub(super) attached: bool,
    /// Whether one of them does not use this generation, or not it alone.
    pub(super) mixed: bool,
}

impl Generations {
    pub(super) fn of(place: &Place) -> Self {
        Self(place.generations())
    }

    pub(super) fn path(&self, generation: u32) -> PathBuf {
        self.0.join(format!("g{generation}"))
    }

    /// Those that are there.
    pub(super) fn all(&self) -> Result<BTreeSet<u32>, Problem> {
        let read = || -> io::Result<BTreeSet<u32>> {
            let mut all = BTreeSet::new();
            for entry in fs::read_dir(&self.0)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    all.extend(entry.file_name().to_str().and_then(|name| numbered(name, "g")));
                }
            }
            Ok(all)
        };
        read().map_err(|error| Problem::file("reading the directory", &self.0, error))
    }

    /// The one that `current` leads to, if that is there.
    pub(super) fn current(&self) -> Option<u32> {
        let target = fs::read_link(self.0.join("current")).ok()?;
        let generation = numbered(target.to_str()?, "g")?;
        self.path(generation).is_dir().then_some(generation)
    }

    /// Has `current` lead to a generation.
    pub(super) fn publish(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        files.lead(&self.0.join("current"), &format!("g{generation}"))
    }

    /// Removes all but one.
    pub(super) fn keep(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        for other in self.all()?.into_iter().filter(|other| *other != generation) {
            self.remove(files, other)?;
        }
        Ok(())
    }

    /// Removes one.
    pub(super) fn remove(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        let path = self.path(generation);
        files.remove_directory(&path).map_err(|error| Problem::file("removing", &path, error))
    }

    /// Which generation to go on with: the one that the attached programs use, or else the one that `current` leads to.
    pub(super) fn serving(&self, place: &Place) -> Result<Serving, Problem> {
        let mut generations = BTreeMap::new();
        for generation in self.all()? {
            let maps = pinned_in(&self.path(generation))?;
            generations.insert(generation, maps.into_values().collect());
        }
        let is_of_services = |name: &str| SERVICES.iter().any(|(service, ..)| *service == name);
        let programs: Vec<BTreeSet<u32>> = used_by_programs(place)?
            .into_iter()
            .map(|maps| maps.into_iter().filter(|(name, _)| is_of_services(name)).map(|(_, id)| id).collect())
            .collect();
        Ok(Serving::of(&generations, &programs, self.current()))
    }
}

impl Serving {
    /// `generations` are the maps of each, and `programs` the maps of Services that each program uses. Maps that did not
    /// grow belong to several generations.
    fn of(
        generations: &BTreeMap<u32, BTreeSet<u32>>,
        programs: &[BTreeSet<u32>],
        current: Option<u32>,
    ) -> Self {
        let ours = |program: &&BTreeSet<u32>| generations.values().any(|maps| !maps.is_disjoint(program));
        let programs: Vec<&BTreeSet<u32>> = programs.iter().filter(ours).collect();
        let first = |program: &&BTreeSet<u32>| {
            let mut fitting = generations.iter().filter(|(_, maps)| program.is_subset(maps));
            fitting.next().map(|(generation, _)| *generation)
        };
        let generation = programs.iter().filter_map(first).max().or(current);
        let maps = generation.and_then(|generation| generations.get(&generation));
        let fits = |program: &&BTreeSet<u32>| maps.is_some_and(|maps| program.is_subset(maps));
        Self { generation, attached: !programs.is_empty(), mixed: !programs.iter().all(fits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Generation 1 with maps 1 and 2, generation 2 with 3 in the place of 1; `current` leads to 2.
    fn serving(programs: &[&[u32]]) -> Serving {
        let set = |maps: &[u32]| maps.iter().copied().collect::<BTreeSet<u32>>();
        let generations = BTreeMap::from([(1, set(&[1, 2])), (2, set(&[2, 3]))]);
        let programs: Vec<BTreeSet<u32>> = programs.iter().map(|maps| set(maps)).collect();
        Serving::of(&generations, &programs, Some(2))
    }

    fn goes_on(generation: u32, attached: bool, mixed: bool) -> Serving {
        Serving { generation: Some(generation), attached, mixed }
    }

    #[test]
    fn what_programs_use_says_which_generation_serves() {
        assert_eq!(serving(&[]), goes_on(2, false, false), "nothing is attached");
        assert_eq!(serving(&[&[9], &[]]), goes_on(2, false, false), "programs of another layout");
        assert_eq!(serving(&[&[1, 2], &[]]), goes_on(1, true, false), "no link was switched yet");
        assert_eq!(serving(&[&[1, 2], &[2, 3]]), goes_on(2, true, true), "some were");
        assert_eq!(serving(&[&[2, 3], &[2]]), goes_on(2, true, false), "all were");
    }

    #[test]
    fn a_program_with_a_map_that_has_no_name_is_to_be_switched() {
        assert_eq!(serving(&[&[1, 2, 9]]), goes_on(2, true, true), "alone");
        assert_eq!(serving(&[&[1, 2], &[2, 9]]), goes_on(1, true, true), "beside one that uses a generation");
    }

    #[test]
    fn a_map_that_did_not_grow_does_not_tell() {
        assert_eq!(serving(&[&[1], &[2]]), goes_on(1, true, false));
        assert_eq!(serving(&[&[2], &[3]]), goes_on(2, true, false));
        assert_eq!(serving(&[&[2]]), goes_on(1, true, false));
    }
}
