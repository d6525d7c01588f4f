//! The operator's commands: one call to the API each, and its answer shown.
//!
//! With `--wait` a command ends with its task, and fails unless the task ended Done.

use std::path::Path;

use anyhow::Context;
use slotmesh_proto::{fleet::v1 as fleet, instance::v1 as instance};

use crate::{
    api::{Api, PATIENCE},
    artifact, auto_upgrade, change,
    command::{
        ArchitectureArg, Command, CreateArgs, FailoverArgs, HostCommand, InstanceCommand,
        StartArgs, SwitchoverArgs,
    },
    drain,
    failure::Failure,
    lost_writes, nodes, progress, proxies,
    render::{self, Output, show},
    status, tasks, upgrade, version,
    views::{
        HostView, InstanceDetailView, InstanceView, ShardView, StartedView, TaskView,
        architecture_value,
    },
};

/// Connects to the controller and does the command.
///
/// # Errors
/// As the controller answered; [`Failure::TaskEnded`] when a task was waited for in vain.
pub async fn run(
    addresses: &str,
    command: Command,
    output: Output,
    verbose: bool,
) -> Result<(), Failure> {
    let mut api = Api::patient(addresses, PATIENCE).await?;
    if verbose {
        let (controller, trace) = (api.address(), api.trace_id());
        render::note(&format!("controller {controller}, trace {trace}"));
    }
    match command {
        Command::Instance(InstanceCommand::Create(args)) => create(&mut api, args, output).await,
        Command::Instance(InstanceCommand::List) => {
            let instances = api.describe_instances(&[]).await?;
            let views: Vec<_> = instances.into_iter().map(InstanceView::from).collect();
            Ok(show(output, &views)?)
        }
        Command::Instance(InstanceCommand::Describe { instance }) => {
            describe(&mut api, &instance, output).await
        }
        Command::Instance(InstanceCommand::Maintain { instance, window }) => {
            change::on_window(&mut api, instance, window, output).await
        }
        Command::Instance(InstanceCommand::AutoUpgrade(args)) => {
            auto_upgrade::on_auto_upgrade(&mut api, args, output).await
        }
        Command::Instance(InstanceCommand::Delete { instance, start }) => {
            delete(&mut api, instance, start, output).await
        }
        Command::Instance(InstanceCommand::ReplaceAfter { instance, seconds }) => {
            nodes::on_replace_after(&mut api, instance, seconds, output).await
        }
        Command::Node(command) => nodes::on_node(&mut api, command, output).await,
        Command::Switchover(args) => switchover(&mut api, args, output).await,
        Command::Account(command) => change::on_account(&mut api, command, output).await,
        Command::Parameters(command) => change::on_parameters(&mut api, command, output).await,
        Command::Durability(command) => change::on_durability(&mut api, command, output).await,
        Command::Artifact(command) => artifact::on_artifact(&mut api, command, output).await,
        Command::Version { instance } => version::on_version(&mut api, instance, output).await,
        Command::Upgrade(args) => upgrade::on_upgrade(&mut api, args, output).await,
        Command::Task(command) => tasks::on_task(&mut api, command, output).await,
        Command::Failover(args) => failover(&mut api, args, output).await,
        Command::Epochs { instance, shard } => {
            tasks::epochs(&mut api, instance, shard, output).await
        }
        Command::Status => status::show_status(&mut api, output).await,
        Command::LostWrites(command) => {
            lost_writes::on_lost_writes(&mut api, command, output).await
        }
        Command::Host(HostCommand::List) => {
            let answer = api
                .call(|api| async move { api.fleet().list_hosts(fleet::ListHostsRequest {}).await })
                .await?;
            let views: Vec<_> = answer.hosts.into_iter().map(HostView::from).collect();
            Ok(show(output, &views)?)
        }
        Command::Host(HostCommand::Drain { host, within }) => {
            drain::on_drain(&mut api, host, within, output).await
        }
        Command::Proxy(command) => proxies::on_proxy(&mut api, command, output).await,
        Command::Up(_) | Command::Demo(_) => {
            unreachable!("these start a mesh of their own and are run by Cli::run")
        }
    }
}

async fn create(api: &mut Api, args: CreateArgs, output: Output) -> Result<(), Failure> {
    let password = args
        .password_file
        .as_deref()
        .map(read_password)
        .transpose()?;
    let request = instance::CreateInstanceRequest {
        name: args.name,
        architecture: architecture(args.architecture),
        shard_count: args.shards.unwrap_or_default(),
        replicas_per_shard: args.replicas,
        proxy_count: args.proxies,
        workers_per_proxy: args.workers.unwrap_or_default(),
        engine: args.engine,
        password: password.unwrap_or_default(),
        client_token: Api::token(args.start.client_token.clone()),
        parameters: args.parameters.into_iter().collect(),
        durability: args.durability,
        replace_after_s: args.replace_after,
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().create_instance(request).await }
        })
        .await?;
    started(
        api,
        Some(answer.instance_id),
        answer.task_id,
        "create",
        args.start.wait,
        output,
    )
    .await
}

async fn describe(api: &mut Api, id: &str, output: Output) -> Result<(), Failure> {
    let found = api.describe_instances(&[id.to_owned()]).await?;
    let Some(instance) = found.into_iter().next() else {
        let status = tonic::Status::not_found(format!("instance {id} does not exist"));
        return Err(Failure::from_status(&status));
    };
    let shards = api
        .describe_shards(id)
        .await?
        .into_iter()
        .map(ShardView::from)
        .collect();
    Ok(show(
        output,
        &InstanceDetailView {
            instance: instance.into(),
            shards,
        },
    )?)
}

async fn delete(
    api: &mut Api,
    instance_id: String,
    start: StartArgs,
    output: Output,
) -> Result<(), Failure> {
    let client_token = Api::token(start.client_token);
    let request = instance::DeleteInstanceRequest {
        instance_id,
        client_token,
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().delete_instance(request).await }
        })
        .await?;
    started(api, None, answer.task_id, "delete", start.wait, output).await
}

async fn switchover(api: &mut Api, args: SwitchoverArgs, output: Output) -> Result<(), Failure> {
    let request = instance::SwitchOverRequest {
        instance_id: args.instance,
        target_primary_node_ids: args.targets,
        target_primary_node_id: String::new(),
        client_token: Api::token(args.start.client_token),
        schedule: tasks::schedule(&args.schedule),
    };
    let task_id = api.switch_over(request).await?;
    started(api, None, task_id, "switchover", args.start.wait, output).await
}

async fn failover(api: &mut Api, args: FailoverArgs, output: Output) -> Result<(), Failure> {
    let request = instance::FailOverRequest {
        instance_id: args.instance,
        shard_id: args.shard,
        accept_data_loss: args.accept_data_loss,
        target_node_id: args.target,
        client_token: Api::token(args.start.client_token),
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().fail_over(request).await }
        })
        .await?;
    started(
        api,
        None,
        answer.task_id,
        "failover",
        args.start.wait,
        output,
    )
    .await
}

/// Shows what was started, and with `--wait` how it ended.
pub(crate) async fn started(
    api: &mut Api,
    instance_id: Option<String>,
    task_id: String,
    title: &str,
    wait: bool,
    output: Output,
) -> Result<(), Failure> {
    let trace_id = api.trace_id().to_owned();
    if !wait {
        return Ok(show(
            output,
            &StartedView {
                instance_id,
                task_id,
                trace_id,
                task: None,
            },
        )?);
    }
    let task = progress::wait(api, &task_id, title).await?;
    let view = Some(TaskView::from(task.clone()));
    show(
        output,
        &StartedView {
            instance_id,
            task_id,
            trace_id,
            task: view,
        },
    )?;
    progress::require_done(&task)
}

/// The value that the API has for an architecture.
pub fn architecture(arg: ArchitectureArg) -> i32 {
    architecture_value(arg.name()).map_or(0, i32::from)
}

/// The first line of a file.
pub(crate) fn read_password(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("read password file {}", path.display()))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
