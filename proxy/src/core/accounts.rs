//! Which account a client uses, and what that lets it do.
//!
//! Invariants: a client with every right has nothing that is looked at per command; one without is
//! checked before anything else happens. An account that is changed counts for the clients that use
//! it from the next command on, and one that is removed closes them.

use std::sync::Arc;

use slotmesh_acl::{Context, Denial, Reason};
use slotmesh_acl::{Denied, User, Users};
use slotmesh_command::{Command, Flag, Needs};

use super::Core;
use super::client::{Client, DEFAULT_USER};
use super::sessions::CloseReason;
use super::spec::{self, Request};

const FUNCTIONS: &str = "NOPERM slotmesh: commands inside a function cannot be checked, so functions \
    need an account that may run every command on every key; those that only read, every one that \
    reads; EVAL is checked";

impl Core {
    pub(super) fn users(&self) -> &Arc<Users> {
        &self.table.settings.users
    }

    pub(super) fn is_user(&self, name: &[u8]) -> bool {
        self.users().get(name).is_some()
    }

    /// True if it is known that clients need not log in.
    pub(super) fn is_open(&self) -> bool {
        let user = self.users().default_user();
        self.ready && user.is_on() && user.is_nopass()
    }

    /// The client uses this account from now on.
    pub(super) fn log_in(&mut self, slot: u32, user: &Arc<User>) {
        if let Some(client) = self.sessions.get_mut(slot) {
            client.log_in(user);
        }
    }

    /// Another set of accounts is in force.
    pub(super) fn refresh_accounts(&mut self, before: &Users) {
        let users = Arc::clone(self.users());
        let open = self.is_open();
        let slots: Vec<u32> = self.sessions.slots().collect();
        for slot in slots {
            let Some(client) = self.sessions.get_mut(slot) else {
                continue;
            };
            if !client.state.authenticated {
                if open {
                    client.log_in(users.default_user());
                }
                continue;
            }
            let name = client.state.user().as_bytes();
            let (old, new) = (before.get(name).cloned(), users.get(name).cloned());
            let Some(new) = new else {
                self.sessions.doom(slot, CloseReason::Killed);
                continue;
            };
            let lost = old.is_some_and(|old| new.loses_channels_of(&old));
            let keeps = !lost || client.may_keep_subscriptions(&new);
            client.log_in(&new);
            if !keeps {
                self.sessions.doom(slot, CloseReason::Killed);
            }
        }
    }

    /// Asks whether the client's account lets it run the command. The text is the whole error.
    pub(super) fn check_account(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Result<(), String> {
        let restricted =
            (self.sessions.get(slot)).and_then(|client| client.extra.as_ref()?.account.clone());
        let Some(user) = restricted else {
            return Ok(());
        };
        if command.flags.has(Flag::NoAuth) {
            return Ok(());
        }
        if let Err(denied) = user.check(command, &request) {
            self.log_denial(slot, denied, command, request);
            return Err(denied.text(command));
        }
        check_function(&user, command)?;
        user.check_sort(command, &request).map_err(str::to_owned)
    }

    fn log_denial(
        &mut self,
        slot: u32,
        denied: Denied,
        command: &'static Command,
        request: Request<'_>,
    ) {
        let (reason, object) = match denied {
            Denied::Command => (Reason::Command, command.name.as_bytes()),
            Denied::Key(at) => (Reason::Key, request.arg(at)),
            Denied::Channel(at) => (Reason::Channel, request.arg(at)),
        };
        self.record_denial(slot, reason, object.to_vec(), None);
    }

    /// A login that was refused.
    pub(super) fn log_refused_login(&mut self, slot: u32, called: &[u8], user: &[u8]) {
        self.record_denial(slot, Reason::Auth, called.to_vec(), Some(user));
    }

    fn record_denial(&mut self, slot: u32, reason: Reason, object: Vec<u8>, user: Option<&[u8]>) {
        let Some(client) = self.sessions.get(slot) else {
            return;
        };
        let mut client_info = String::new();
        self.describe_client(client, &mut client_info);
        let in_transaction = client.state.transaction.is_some();
        let username = user.unwrap_or(client.state.user().as_bytes()).to_vec();
        let denial = Denial {
            reason,
            context: if in_transaction {
                Context::Multi
            } else {
                Context::Toplevel
            },
            object,
            username,
            client_info: client_info.trim_end().to_owned(),
        };
        let now_ms = self.now_unix_us / 1000;
        self.acl_log().record(denial, now_ms);
    }

    pub(super) fn acl_log(&self) -> std::sync::MutexGuard<'_, slotmesh_acl::AclLog> {
        // A panic of another worker ends the process anyway.
        self.acl_log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Client {
    fn log_in(&mut self, user: &Arc<User>) {
        self.state.authenticated = true;
        self.state.user = (user.name() != DEFAULT_USER).then(|| Box::from(user.name()));
        if !user.is_unrestricted() {
            let extra = self.extra_mut();
            (extra.account, extra.rules_in_lua) = (Some(Arc::clone(user)), None);
        } else if let Some(extra) = &mut self.extra {
            (extra.account, extra.rules_in_lua) = (None, None);
            self.tidy_extra();
        }
    }

    /// The account, if it may not do everything.
    pub(super) fn limited(&self) -> Option<&User> {
        self.extra.as_ref()?.account.as_deref()
    }

    /// Nobody is logged in.
    pub(super) fn log_out(&mut self) {
        self.state.authenticated = false;
        self.state.user = None;
        if let Some(extra) = &mut self.extra {
            (extra.account, extra.rules_in_lua) = (None, None);
            self.tidy_extra();
        }
    }
}

/// Whether a script can call the command.
pub(super) fn is_callable(one: &Command) -> bool {
    let harmless = !one.flags.has(Flag::Admin) && !one.flags.has(Flag::Dangerous);
    let data = spec::is_permitted(one) && (harmless || spec::DANGEROUS_DATA.contains(&one.name));
    data && !one.flags.has(Flag::NoScript)
}

/// Whether the user is allowed whatever a script can do, so that nobody needs to check its calls.
pub(super) fn may_script(user: &User) -> bool {
    user.may_run_any(Needs::BOTH, is_callable)
}

/// What a function does at the node is done with the proxy's rights, and its calls cannot be checked as
/// those of a script, since it is everybody's.
fn check_function(user: &User, command: &Command) -> Result<(), String> {
    let fine = match command.name {
        "fcall" => may_script(user),
        "fcall_ro" => {
            let reads = |one: &Command| is_callable(one) && one.flags.has(Flag::ReadOnly);
            user.may_run_any(Needs::READ, reads)
        }
        _ => true,
    };
    fine.then_some(()).ok_or_else(|| FUNCTIONS.to_owned())
}
