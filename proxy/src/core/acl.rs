//! ACL: accounts of the instance, shown and changed through any proxy.
//!
//! Invariant: accounts live in the topology. A change is stored by the controller, and answered once
//! this process has it; nothing is changed here.

use rand::Rng as _;
use slotmesh_acl::{User, categories, commands_in};
use slotmesh_command::Command;
use slotmesh_resp::{Protocol, Value, parse_i64, write};

use super::Core;
use super::call::Call;
use super::dispatch::Flow;
use super::job::{Answers, Job, Round, Step};
use super::spec::Request;

const NO_FILE: &[u8] = b"ERR This Redis instance is not configured to use an ACL file. You may want \
    to specify users via the ACL SETUSER command and then issue a CONFIG REWRITE (assuming you have \
    a Redis configuration file set) in order to store users in the Redis configuration.";
const GENPASS_RANGE: &[u8] = b"ERR ACL GENPASS argument must be the number of bits for the output \
    password, a positive number up to 4096";
const NOT_AN_INTEGER: &[u8] = b"ERR value is not an integer or out of range";
/// Entries that ACL LOG shows if it is not told.
const LOG_SHOWN: usize = 10;

impl Core {
    pub(super) fn acl_command(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        match command.name {
            "acl|whoami" => {
                let user = (self.sessions.get(slot)).map(|c| c.state.user().to_owned());
                let user = user.unwrap_or_default();
                self.reply_with(slot, |out| write::write_bulk(out, user.as_bytes()))
            }
            "acl|list" => {
                let lines: Vec<String> = self.users().list().collect();
                self.reply_strings(slot, &lines)
            }
            "acl|users" => {
                let names = self.users().iter().map(|u| u.name().to_owned());
                let names: Vec<String> = names.collect();
                self.reply_strings(slot, &names)
            }
            "acl|getuser" => self.acl_getuser(slot, request.arg(2)),
            "acl|setuser" => self.acl_setuser(slot, request),
            "acl|deluser" => self.acl_deluser(slot, request),
            "acl|cat" => self.acl_cat(slot, request),
            "acl|dryrun" => self.acl_dryrun(slot, request),
            "acl|log" => self.acl_log_command(slot, request),
            "acl|genpass" => self.acl_genpass(slot, request),
            "acl|load" | "acl|save" => self.reply_error(slot, NO_FILE),
            _ => self.unsupported(slot, command),
        }
    }

    fn reply_strings(&mut self, slot: u32, all: &[impl AsRef<str>]) -> Flow {
        self.reply_with(slot, |out| {
            write::write_array_header(out, all.len());
            all.iter()
                .for_each(|one| write::write_bulk(out, one.as_ref().as_bytes()));
        })
    }

    fn acl_getuser(&mut self, slot: u32, name: &[u8]) -> Flow {
        let protocol = self.protocol(slot);
        let Some(user) = self.users().get(name).cloned() else {
            return self.reply_with(slot, |out| write::write_null(out, protocol));
        };
        let described = user.description();
        self.reply_with(slot, |out| {
            let text = |out: &mut Vec<u8>, text: &str| write::write_bulk(out, text.as_bytes());
            write::write_map_header(out, protocol, 6);
            text(out, "flags");
            write::write_set_header(out, protocol, described.flags.len());
            described.flags.iter().for_each(|flag| text(out, flag));
            text(out, "passwords");
            write::write_array_header(out, described.passwords.len());
            described.passwords.iter().for_each(|hash| text(out, hash));
            for (name, value) in [
                ("commands", &described.root.commands),
                ("keys", &described.root.keys),
                ("channels", &described.root.channels),
            ] {
                text(out, name);
                text(out, value);
            }
            text(out, "selectors");
            write::write_array_header(out, described.selectors.len());
            for selector in &described.selectors {
                write::write_map_header(out, protocol, 3);
                for (name, value) in [
                    ("commands", &selector.commands),
                    ("keys", &selector.keys),
                    ("channels", &selector.channels),
                ] {
                    text(out, name);
                    text(out, value);
                }
            }
        })
    }

    fn acl_setuser(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let name = request.arg(2);
        let valid = std::str::from_utf8(name)
            .ok()
            .filter(|_| User::is_name(name));
        let Some(name) = valid else {
            let text = b"ERR Usernames can't contain spaces or null characters";
            return self.reply_error(slot, text);
        };
        let known = self.users().get(name.as_bytes());
        let mut user = known.map_or_else(|| User::new(name), |user| (**user).clone());
        let rules: Vec<&[u8]> = (3..request.len()).map(|at| request.arg(at)).collect();
        if let Err(error) = user.set(&rules) {
            return self.reply_error(slot, error.to_string().as_bytes());
        }
        let call = Call::Accounts {
            set: vec![(name.to_owned(), user.to_rules())],
            removed: Vec::new(),
        };
        self.change_accounts(slot, call, None)
    }

    fn acl_deluser(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let names: Vec<&[u8]> = (2..request.len()).map(|at| request.arg(at)).collect();
        if names.contains(&&b"default"[..]) {
            return self.reply_error(slot, b"ERR The 'default' user cannot be removed");
        }
        let known = names.iter().filter_map(|name| self.users().get(name));
        let mut removed: Vec<String> = known.map(|user| user.name().to_owned()).collect();
        removed.sort_unstable();
        removed.dedup();
        let count = removed.len() as i64;
        if count == 0 {
            return self.reply_with(slot, |out| write::write_int(out, 0));
        }
        let call = Call::Accounts {
            set: Vec::new(),
            removed,
        };
        self.change_accounts(slot, call, Some(count))
    }

    fn change_accounts(&mut self, slot: u32, call: Call, count: Option<i64>) -> Flow {
        let job = ChangeAccounts {
            call: Some(call),
            count,
        };
        self.start_job(slot, Box::new(job))
    }

    fn acl_cat(&mut self, slot: u32, request: Request<'_>) -> Flow {
        match request.len() {
            2 => self.reply_strings(slot, &categories().collect::<Vec<_>>()),
            3 => match commands_in(request.arg(2)) {
                Some(commands) => self.reply_strings(slot, &commands),
                None => {
                    let name = String::from_utf8_lossy(request.arg(2));
                    let text = format!("ERR Unknown category '{name}'");
                    self.reply_error(slot, text.as_bytes())
                }
            },
            _ => self.refuse(slot, b"ERR wrong number of arguments for 'acl|cat' command"),
        }
    }

    fn acl_dryrun(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let shown = |at: usize| String::from_utf8_lossy(request.arg(at)).into_owned();
        let Some(user) = self.users().get(request.arg(2)).cloned() else {
            let text = format!("ERR User '{}' not found", shown(2));
            return self.reply_error(slot, text.as_bytes());
        };
        let words: Vec<&[u8]> = (3..request.len()).map(|at| request.arg(at)).collect();
        let command = match slotmesh_command::resolve(&words[..]) {
            Ok(command) => command,
            Err(slotmesh_command::CommandError::WrongArity(name)) => {
                let text = format!("ERR wrong number of arguments for '{name}' command");
                return self.reply_error(slot, text.as_bytes());
            }
            Err(_) => {
                let text = format!("ERR Command '{}' not found", shown(3));
                return self.reply_error(slot, text.as_bytes());
            }
        };
        match user.check(command, &words[..]) {
            Ok(()) => self.reply_simple(slot, "OK"),
            Err(denied) => {
                let text = denied.dry_run_text(command, &words[..]);
                self.reply_with(slot, |out| write::write_bulk(out, &text))
            }
        }
    }

    fn acl_log_command(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let shown = match request.len() {
            2 => LOG_SHOWN,
            3 if request.is(2, "reset") => {
                self.acl_log().reset();
                return self.reply_simple(slot, "OK");
            }
            3 => match parse_i64(request.arg(2)) {
                Some(count) => usize::try_from(count).unwrap_or(0),
                None => return self.reply_error(slot, NOT_AN_INTEGER),
            },
            _ => return self.refuse(slot, b"ERR wrong number of arguments for 'acl|log' command"),
        };
        let (protocol, now_ms) = (self.protocol(slot), self.now_unix_us / 1000);
        let mut reply = Vec::new();
        {
            let log = self.acl_log();
            let entries: Vec<_> = log.entries().take(shown).collect();
            write::write_array_header(&mut reply, entries.len());
            for entry in entries {
                write_entry(&mut reply, protocol, entry, now_ms);
            }
        }
        self.reply_with(slot, |out| out.extend_from_slice(&reply))
    }

    fn acl_genpass(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let bits = match request.len() {
            2 => 256,
            3 => match parse_i64(request.arg(2)) {
                Some(bits @ 1..=4096) => bits as usize,
                _ => return self.reply_error(slot, GENPASS_RANGE),
            },
            _ => {
                let text = b"ERR wrong number of arguments for 'acl|genpass' command";
                return self.refuse(slot, text);
            }
        };
        let mut random = rand::rng();
        let digits = bits.div_ceil(4);
        let password: String = (0..digits)
            .map(|_| char::from(b"0123456789abcdef"[random.random_range(0..16)]))
            .collect();
        self.reply_with(slot, |out| write::write_bulk(out, password.as_bytes()))
    }
}

fn write_entry(out: &mut Vec<u8>, protocol: Protocol, entry: &slotmesh_acl::Entry, now_ms: u64) {
    let denial = &entry.denial;
    write::write_map_header(out, protocol, 7);
    write::write_bulk(out, b"count");
    write::write_int(out, entry.count as i64);
    for (name, value) in [
        ("reason", denial.reason.name().as_bytes()),
        ("context", denial.context.name().as_bytes()),
        ("object", &denial.object),
        ("username", &denial.username),
    ] {
        write::write_bulk(out, name.as_bytes());
        write::write_bulk(out, value);
    }
    write::write_bulk(out, b"age-seconds");
    write::write_double(out, protocol, entry.age_seconds(now_ms));
    write::write_bulk(out, b"client-info");
    write::write_bulk(out, denial.client_info.as_bytes());
}

/// Has accounts stored.
#[derive(Debug)]
struct ChangeAccounts {
    call: Option<Call>,
    /// What DELUSER answers.
    count: Option<i64>,
}

impl Job for ChangeAccounts {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if let Some(call) = self.call.take() {
            round.call(call);
            return Step::Asked;
        }
        let answer = answers.first().map_or(&[][..], Vec::as_slice);
        match (Value::decode(answer), self.count) {
            (Ok(Some((Value::Error(_), _))), _) | (_, None) => round.pass(answer),
            (_, Some(count)) => round.done(|out, _| write::write_int(out, count)),
        }
    }
}
