//! The agent without its threads: model, planner and one data plane, brought up to date on demand.
//!
//! In: [`Change`]s. Out: a data plane that holds what they mean. Every try is the caller's, so a test sees each failure.

use std::mem;

use weir::{
    dataplane::{Dataplane, Error, Shortfall, State},
    model::{Change, Model, Settings},
    plan::{Delta, Planner},
};

/// Model, planner and data plane.
#[derive(Debug)]
pub struct Agent<D> {
    model: Model,
    planner: Planner,
    plane: D,
    /// Whether the next delta has to be a complete one.
    from_scratch: bool,
}

impl<D: Dataplane> Agent<D> {
    /// An agent that has just started.
    #[must_use]
    pub fn new(settings: Settings, plane: D) -> Self {
        Self { model: Model::new(settings), planner: Planner::default(), plane, from_scratch: true }
    }

    /// The model, to hand it more.
    pub fn model(&mut self) -> &mut Model {
        &mut self.model
    }

    /// Takes in one change; nothing is programmed yet.
    pub fn take_in(&mut self, change: Change) {
        self.model.apply(change);
    }

    /// Starts over with a data plane just opened, as a new process does that has the same objects.
    pub fn restart(&mut self, plane: D) {
        self.plane = plane;
        self.from_scratch = true;
    }

    /// Starts over with the data plane as it is, like a new process without objects.
    ///
    /// # Errors
    ///
    /// When the data plane cannot be read.
    pub fn forget(&mut self, settings: Settings) -> Result<(), Error> {
        (self.model, self.planner) = (Model::new(settings), Planner::default());
        self.reread()
    }

    /// Has the data plane read, and everything compared with it next time.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn reread(&mut self) -> Result<(), Error> {
        self.from_scratch = true;
        self.plane.reread()
    }

    /// Tries once to make the data plane hold what is known.
    ///
    /// # Errors
    ///
    /// The data plane's. The next try does what is needed to put things right.
    pub fn bring_up_to_date(&mut self) -> Result<(), Error> {
        self.bring_into_force().map(drop)
    }

    /// [`Agent::bring_up_to_date`], and what is in force by it.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn bring_into_force(&mut self) -> Result<Delta, Error> {
        for name in self.model.take_dirty() {
            self.planner.update(&name, self.model.plan(&name));
        }
        self.planner.update_node(self.model.node_plan());
        self.planner.retry();
        let complete = mem::take(&mut self.from_scratch);
        let delta = if complete { self.planner.complete() } else { self.planner.take_delta() };
        let result = self.plane.apply(&delta);
        let none = Shortfall::default();
        let (short, repairable) = match &result {
            Ok(()) => (&none, true),
            Err(Error::Partly(short)) => (short, short.failed.is_empty()),
            Err(_) => (&none, false),
        };
        let refused: Vec<_> = short.refused.iter().map(|(id, _)| id.clone()).collect();
        self.planner.record_left(short.left.iter().map(|(id, _)| id.clone()));
        let entangled = self.planner.record_applied(&delta, &refused);
        let orphaned = self.planner.take_orphaned();
        if !repairable || [entangled, orphaned].iter().any(|families| families.v4 || families.v6) {
            self.reread()?;
        }
        result.map(|()| delta)
    }

    pub const fn planner(&self) -> &Planner {
        &self.planner
    }

    /// Whether the data plane has everything.
    pub fn is_up_to_date(&mut self) -> bool {
        !self.from_scratch && !self.planner.has_waiting() && self.planner.take_delta().is_empty()
    }

    pub fn plane(&mut self) -> &mut D {
        &mut self.plane
    }

    /// The state that the data plane holds.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn dump(&mut self) -> Result<State, Error> {
        self.plane.dump()
    }
}
