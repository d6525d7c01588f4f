//! Commands that not every node of the instance knows, while an upgrade of its engine is under way.
//!
//! Until an upgrade is finalized, an engine of before may have to serve again, and until every shard is
//! upgraded, some serve with it. So what that engine does not know is answered as it would answer,
//! whoever serves: clients cannot tell this time from the one before, and nothing is written that the
//! engine of before could not have followed.
//!
//! Invariants: only what would be sent to a node is held back; what the proxy answers itself it answers
//! as ever. Not seen: what scripts and functions call, and commands that were queued before. A node that
//! follows with the engine of before counts those, and its count is looked at before it serves again.

use slotmesh_command::{Class, Command, Release};

use super::Core;
use super::dispatch::Flow;
use super::spec::Request;

impl Core {
    /// The way of a plain client's command while something is held back.
    #[cold]
    pub(super) fn route_known(
        &mut self,
        release: Release,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        match self.refused_as_unknown(release, slot, command, request) {
            Some(flow) => flow,
            None => self.route(slot, command, request),
        }
    }

    /// The refusal of a call that an engine of this release does not understand; `None`: it may go on.
    pub(super) fn refused_as_unknown(
        &mut self,
        release: Release,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Option<Flow> {
        let text = command.refusal(release, &request)?;
        if !self.reaches_a_node(command, request) {
            return None;
        }
        if !command.is_known_to(release)
            && let Some(client) = self.sessions.get_mut(slot)
        {
            client.last_command = None; // as of any unknown one
        }
        Some(self.refuse(slot, &text))
    }

    fn reaches_a_node(&self, command: &Command, request: Request<'_>) -> bool {
        match command.class {
            Class::Proxy => command.name.starts_with("command|"),
            Class::Refused(_) => false,
            // Over several shards the proxy computes it from what every engine knows.
            Class::Computed => self.shard_of_keys(command, request).is_ok(),
            _ => true,
        }
    }
}
