//! Commands on nodes: replacing one on another host, and which of them is promoted first.

use slotmesh_proto::instance::v1 as instance;

use crate::{
    api::Api,
    command::NodeCommand,
    failure::Failure,
    operate::started,
    render::{Output, show},
    views::{InstanceDetailView, InstanceView, ShardView},
};

/// Does a `node` command.
///
/// # Errors
/// As the controller answered; [`Failure::TaskEnded`] when a task was waited for in vain.
pub async fn on_node(api: &mut Api, command: NodeCommand, output: Output) -> Result<(), Failure> {
    match command {
        NodeCommand::Replace {
            instance,
            node,
            to,
            start,
        } => {
            let request = instance::ReplaceNodeRequest {
                instance_id: instance,
                node_id: node,
                to_host_id: to,
                client_token: Api::token(start.client_token),
            };
            let answer = api
                .call(|api| {
                    let request = request.clone();
                    async move { api.instances().replace_node(request).await }
                })
                .await?;
            started(api, None, answer.task_id, "replace", start.wait, output).await
        }
        NodeCommand::Priority {
            instance,
            node,
            priority,
            client_token,
        } => {
            let request = instance::SetNodePriorityRequest {
                instance_id: instance.clone(),
                node_id: node,
                priority,
                client_token: Api::token(Some(client_token)),
            };
            api.call(|api| {
                let request = request.clone();
                async move { api.instances().set_node_priority(request).await }
            })
            .await?;
            describe(api, instance, output).await
        }
    }
}

/// Sets after which time without its host a node is replaced, and shows the instance.
///
/// # Errors
/// As the controller answered.
pub async fn on_replace_after(
    api: &mut Api,
    instance_id: String,
    seconds: u32,
    output: Output,
) -> Result<(), Failure> {
    let request = instance::ModifyInstanceReplaceAfterRequest {
        instance_id: instance_id.clone(),
        replace_after_s: seconds,
        client_token: Api::token(None),
    };
    api.call(|api| {
        let request = request.clone();
        async move { api.instances().modify_instance_replace_after(request).await }
    })
    .await?;
    describe(api, instance_id, output).await
}

async fn describe(api: &mut Api, instance_id: String, output: Output) -> Result<(), Failure> {
    let shards = api.describe_shards(&instance_id).await?;
    let shards: Vec<_> = shards.into_iter().map(ShardView::from).collect();
    let found = api.describe_instances(&[instance_id]).await?;
    let details = found.into_iter().map(InstanceView::from);
    for instance in details {
        let shards = shards.clone();
        show(output, &InstanceDetailView { instance, shards })?;
    }
    Ok(())
}
