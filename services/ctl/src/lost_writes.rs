//! Writes of lost primaries: which are kept, what they are, and giving some of them to their instance
//! again.
//!
//! Invariant: nothing is sent without `--yes`, and nothing of a file that is not the one that was
//! recorded.

pub mod file;

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use serde::Serialize;
use slotmesh_proto::task::v1 as task;
use slotmesh_resp::Value;

use self::file::{LostCommand, LostFile, matches};
use crate::{
    api::Api,
    failure::Failure,
    operate::read_password,
    redis::Client,
    render::{Output, Text, note, show, show_line, table},
};

#[derive(Debug, Subcommand)]
pub enum LostWritesCommand {
    /// Every file that is kept, with how many writes it holds.
    List {
        /// Only of this instance.
        #[arg(value_name = "INSTANCE", default_value = "")]
        instance: String,
    },
    /// The commands of a file, one a line.
    Show {
        #[arg(value_name = "INSTANCE")]
        instance: String,
        #[arg(value_name = "FILE")]
        file: String,
        #[command(flatten)]
        selection: Selection,
    },
    /// Sends commands of a file to the instance again, in their order, as if a client did now.
    ///
    /// What clients have written since then may be overwritten: look with `show` first, and select.
    Replay(ReplayArgs),
}

/// Which commands of a file.
#[derive(Debug, Clone, Default, Args)]
pub struct Selection {
    /// Only commands with such a key; `*` is anything, `?` any one character.
    #[arg(long, value_name = "PATTERN")]
    pub only: Option<String>,
    /// Only commands of this name; may be repeated.
    #[arg(long = "command", value_name = "NAME")]
    pub commands: Vec<String>,
    /// Only from the command with this number on.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub from: u64,
}

#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    #[arg(value_name = "FILE")]
    pub file: String,
    #[command(flatten)]
    pub selection: Selection,
    /// User to log in as [default: the instance's default user].
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// File whose first line is the password.
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// Really sends them; without it they are only counted.
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Clone, Serialize)]
struct LostWritesView {
    shard_id: String,
    epoch: u64,
    node_id: String,
    host_id: String,
    agent_address: String,
    file: String,
    bytes: u64,
    commands: u64,
    complete: bool,
    /// It is not complete.
    why: String,
    time: String,
    sha256: String,
}

#[derive(Debug, Clone, Serialize)]
struct CommandView {
    number: u64,
    database: u32,
    /// Bytes that are no text are shown as \xHH.
    command: Vec<String>,
    #[serde(skip)]
    line: String,
}

#[derive(Debug, Clone, Serialize)]
struct ReplayView {
    instance_id: String,
    file: String,
    endpoint: String,
    selected: u64,
    sent: u64,
}

/// Does the command.
///
/// # Errors
/// As the controller, the agent that keeps a file, or the instance answered.
pub async fn on_lost_writes(
    api: &mut Api,
    command: LostWritesCommand,
    output: Output,
) -> Result<(), Failure> {
    match command {
        LostWritesCommand::List { instance } => {
            let found = list(api, instance).await?;
            let views: Vec<_> = found.into_iter().map(LostWritesView::from).collect();
            Ok(show(output, &views)?)
        }
        LostWritesCommand::Show {
            instance,
            file,
            selection,
        } => {
            let lost = find(api, &instance, &file).await?;
            if !lost.complete {
                note(&format!("the file is not complete: {}", reason(&lost)));
            }
            let mut open = LostFile::open(&lost).await?;
            while let Some(commands) = open.next().await? {
                for command in commands.iter().filter(|c| selection.has(c)) {
                    show_line(output, &CommandView::from(command))?;
                }
            }
            Ok(())
        }
        LostWritesCommand::Replay(args) => replay(api, args, output).await,
    }
}

async fn list(api: &mut Api, instance_id: String) -> Result<Vec<task::LostWrites>, Failure> {
    let request = task::ListLostWritesRequest { instance_id };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.tasks().list_lost_writes(request).await }
        })
        .await?;
    Ok(answer.lost_writes)
}

async fn find(api: &mut Api, instance: &str, file: &str) -> Result<task::LostWrites, Failure> {
    let all = list(api, instance.to_owned()).await?;
    let found = all.into_iter().find(|lost| lost.file == file);
    found.ok_or_else(|| {
        Failure::RefusedHere(format!(
            "no file {file} is kept of instance {instance}; `slotmesh lost-writes list` shows which are"
        ))
    })
}

impl Selection {
    fn has(&self, command: &LostCommand) -> bool {
        let name = command.name();
        let named = self.commands.is_empty()
            || self
                .commands
                .iter()
                .any(|wanted| wanted.eq_ignore_ascii_case(&name));
        let keyed = self
            .only
            .as_deref()
            .is_none_or(|pattern| command.keys().any(|key| matches(pattern.as_bytes(), key)));
        named && keyed && command.number >= self.from
    }
}

async fn replay(api: &mut Api, args: ReplayArgs, output: Output) -> Result<(), Failure> {
    let lost = find(api, &args.instance, &args.file).await?;
    let instances = api
        .describe_instances(std::slice::from_ref(&args.instance))
        .await?;
    let proxies = instances.into_iter().flat_map(|instance| instance.proxies);
    let endpoint = proxies
        .map(|proxy| proxy.address)
        .find(|address| !address.is_empty());
    let endpoint = endpoint.ok_or_else(|| {
        Failure::RefusedHere("no proxy of the instance serves: nothing was sent".to_owned())
    })?;
    // All of it is read before any of it is sent: a changed file is found only at its end.
    let mut view = ReplayView {
        instance_id: args.instance.clone(),
        file: args.file.clone(),
        endpoint,
        selected: 0,
        sent: 0,
    };
    let mut open = LostFile::open(&lost).await?;
    while let Some(commands) = open.next().await? {
        view.selected += commands.iter().filter(|c| args.selection.has(c)).count() as u64;
    }
    if !lost.complete {
        note(&format!("the file is not complete: {}", reason(&lost)));
    }
    if !args.yes {
        note("nothing was sent; add --yes to send them");
        return Ok(show(output, &view)?);
    }
    let mut client = connect(&view.endpoint, &args).await?;
    let mut database = 0;
    let mut open = LostFile::open(&lost).await?;
    while let Some(commands) = open.next().await? {
        for command in commands.iter().filter(|c| args.selection.has(c)) {
            send(&mut client, command, &mut database)
                .await
                .with_context(|| {
                    format!(
                        "stopped at command {} ({}), after {} that were taken; when that is mended, \
                         go on with --from {}",
                        command.number,
                        command.name(),
                        view.sent,
                        command.number
                    )
                })?;
            view.sent += 1;
        }
    }
    Ok(show(output, &view)?)
}

async fn connect(endpoint: &str, args: &ReplayArgs) -> Result<Client, Failure> {
    let client = Client::connect(endpoint).await;
    let mut client = client.with_context(|| format!("connect to the instance at {endpoint}"))?;
    if let Some(path) = &args.password_file {
        let password = read_password(path)?;
        let user = args.user.as_deref().unwrap_or("default");
        let login: [&[u8]; 3] = [b"AUTH", user.as_bytes(), password.as_bytes()];
        taken(&client.call(&login).await.context("log in")?)?;
    }
    Ok(client)
}

async fn send(
    client: &mut Client,
    command: &LostCommand,
    database: &mut u32,
) -> anyhow::Result<()> {
    if *database != command.database {
        let index = command.database.to_string();
        taken(&client.call(&[b"SELECT", index.as_bytes()]).await?)?;
        *database = command.database;
    }
    let arguments: Vec<&[u8]> = command.arguments.iter().map(Vec::as_slice).collect();
    let answer = client.call(&arguments).await;
    taken(&answer.context("the outcome of this one is not known")?)
}

fn taken(answer: &Value) -> anyhow::Result<()> {
    match answer.as_error() {
        Some(why) => Err(anyhow!("the instance answered: {why}")),
        None => Ok(()),
    }
}

/// Older agents do not say.
fn reason(lost: &task::LostWrites) -> &str {
    match lost.why.as_str() {
        "" => "the node no longer had all of it",
        why => why,
    }
}

impl From<task::LostWrites> for LostWritesView {
    fn from(from: task::LostWrites) -> Self {
        Self {
            shard_id: from.shard_id,
            epoch: from.epoch,
            node_id: from.node_id,
            host_id: from.host_id,
            agent_address: from.agent_address,
            file: from.file,
            bytes: from.bytes,
            commands: from.commands,
            complete: from.complete,
            why: from.why,
            time: from.time,
            sha256: from.sha256,
        }
    }
}

impl From<&LostCommand> for CommandView {
    fn from(from: &LostCommand) -> Self {
        let text = |bytes: &Vec<u8>| match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.escape_ascii().to_string(),
        };
        Self {
            number: from.number,
            database: from.database,
            command: from.arguments.iter().map(text).collect(),
            line: from.line(),
        }
    }
}

impl Text for Vec<LostWritesView> {
    fn text(&self) -> String {
        table(
            [
                "FILE", "SHARD", "EPOCH", "NODE", "HOST", "COMMANDS", "BYTES", "COMPLETE", "TIME",
            ],
            self.iter().map(|l| {
                [
                    l.file.clone(),
                    l.shard_id.clone(),
                    l.epoch.to_string(),
                    l.node_id.clone(),
                    l.host_id.clone(),
                    l.commands.to_string(),
                    l.bytes.to_string(),
                    if l.complete { "yes" } else { "no" }.to_owned(),
                    l.time.clone(),
                ]
            }),
        )
    }
}

impl Text for CommandView {
    fn text(&self) -> String {
        format!("{} db{} {}", self.number, self.database, self.line)
    }
}

impl Text for ReplayView {
    fn text(&self) -> String {
        format!(
            "{} of {} selected commands sent to {}",
            self.sent, self.selected, self.endpoint
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(number: u64, words: &[&str]) -> LostCommand {
        LostCommand {
            number,
            database: 0,
            arguments: words.iter().map(|w| w.as_bytes().to_vec()).collect(),
        }
    }

    #[test]
    fn a_selection_is_by_key_name_and_number_together() {
        let all = [
            command(1, &["SET", "user:1", "v"]),
            command(2, &["DEL", "other", "user:2"]),
            command(3, &["set", "other", "user:3"]),
            command(4, &["FLUSHALL"]),
        ];
        let select = |only: Option<&str>, names: &[&str], from| {
            let selection = Selection {
                only: only.map(str::to_owned),
                commands: names.iter().map(|n| (*n).to_owned()).collect(),
                from,
            };
            let found = all.iter().filter(|c| selection.has(c));
            found.map(|c| c.number).collect::<Vec<_>>()
        };
        assert_eq!(select(None, &[], 1), [1, 2, 3, 4]);
        assert_eq!(select(Some("user:*"), &[], 1), [1, 2]);
        assert_eq!(select(Some("user:*"), &["set"], 1), [1]);
        assert_eq!(select(None, &["SET", "FLUSHALL"], 2), [3, 4]);
    }
}
