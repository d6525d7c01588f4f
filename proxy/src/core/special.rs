//! Commands of clients that are not plain: each question that must be asked before a command may
//! go its usual way, in the order in which Redis asks them.

use slotmesh_command::{Command, Flag};

use super::Core;
use super::dispatch::{Flow, NO_AUTH, NOT_READY};
use super::spec::Request;

impl Core {
    pub(super) fn command_special(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        if !client.state.authenticated && !command.flags.has(Flag::NoAuth) {
            let text = if self.ready { NO_AUTH } else { NOT_READY };
            return self.refuse(slot, text.as_bytes());
        }
        if let Err(text) = self.check_account(slot, command, request) {
            return self.refuse(slot, text.as_bytes());
        }
        if let Some(text) = self.refused_while_subscribed(slot, command) {
            return self.refuse(slot, text.as_bytes());
        }
        if let Some(text) = self.refused_while_monitoring(slot, command) {
            return self.refuse(slot, text.as_bytes());
        }
        if let Some(flow) = self.refused_while_busy(slot, command) {
            return flow;
        }
        if let Some(release) = self.held_back
            && let Some(flow) = self.refused_as_unknown(release, slot, command, request)
        {
            return flow;
        }
        let confined = match self.confine(slot, command, request) {
            Ok(confined) => confined,
            Err(text) => return self.refuse(slot, text.as_bytes()),
        };
        let (command, request) = match &confined {
            Some(confined) => (confined.command, confined.request()),
            None => (command, request),
        };
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        let tracks = client.is_tracking();
        let queues = client.state.transaction.is_some();
        if queues && command.name == "exec" {
            self.show_refused_exec(slot);
        }
        if tracks {
            if let Some(flow) = self.track_on_own_lane(slot, command, request) {
                return flow;
            }
            self.track_reads(slot, command, request);
        }
        let flow = if queues {
            self.in_transaction(slot, command, request)
        } else {
            self.route(slot, command, request)
        };
        if tracks && flow == Flow::Taken {
            self.end_caching(slot, command);
        }
        flow
    }
}
