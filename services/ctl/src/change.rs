//! Commands that change what an instance is like while it serves: accounts and parameters.
//!
//! A password is hashed here: it never leaves this process in clear text.

use std::path::Path;

use sha2::{Digest, Sha256};
use slotmesh_proto::{instance::v1 as instance, topology::v1::Account};

use crate::{
    api::Api,
    command::{
        AccountCommand, AccountSetArgs, DurabilityCommand, ParametersCommand, ParametersSetArgs,
    },
    failure::Failure,
    operate::read_password,
    render::{Output, show},
    views::{AccountView, InstanceView, ParametersView},
};

/// Does an `account` command.
///
/// # Errors
/// As the controller answered.
pub async fn on_account(
    api: &mut Api,
    command: AccountCommand,
    output: Output,
) -> Result<(), Failure> {
    let instance_id = match command {
        AccountCommand::Set(args) => {
            let account = Account {
                rules: rules(&args)?,
                name: args.name,
            };
            update(api, &args.instance, vec![account], Vec::new()).await?;
            args.instance
        }
        AccountCommand::Remove { instance, names } => {
            update(api, &instance, Vec::new(), names).await?;
            instance
        }
        AccountCommand::List { instance } => instance,
    };
    let request = instance::DescribeAccountsRequest { instance_id };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().describe_accounts(request).await }
        })
        .await?;
    let views: Vec<_> = answer.accounts.into_iter().map(AccountView::from).collect();
    Ok(show(output, &views)?)
}

async fn update(
    api: &mut Api,
    instance_id: &str,
    accounts: Vec<Account>,
    removed: Vec<String>,
) -> Result<(), Failure> {
    let request = instance::UpdateAccountsRequest {
        instance_id: instance_id.to_owned(),
        accounts,
        removed,
        client_token: Api::token(None),
    };
    api.call(|api| {
        let request = request.clone();
        async move { api.instances().update_accounts(request).await }
    })
    .await
    .map(drop)
}

fn rules(args: &AccountSetArgs) -> Result<Vec<String>, Failure> {
    let mut rules: Vec<String> = args.rules.iter().map(|rule| hashed(rule)).collect();
    if let Some(path) = &args.password_file {
        rules.push(password_rule(path)?);
    }
    Ok(rules)
}

fn password_rule(path: &Path) -> Result<String, Failure> {
    Ok(hashed(&format!(">{}", read_password(path)?)))
}

/// `>password` and `<password` as the rules with the password's hash.
fn hashed(rule: &str) -> String {
    let hash = |password: &str| hex::encode(Sha256::digest(password.as_bytes()));
    match (rule.strip_prefix('>'), rule.strip_prefix('<')) {
        (Some(password), _) => format!("#{}", hash(password)),
        (_, Some(password)) => format!("!{}", hash(password)),
        _ => rule.to_owned(),
    }
}

/// Does a `parameters` command.
///
/// # Errors
/// As the controller answered; in the words of an engine that refused.
pub async fn on_parameters(
    api: &mut Api,
    command: ParametersCommand,
    output: Output,
) -> Result<(), Failure> {
    let instance_id = match command {
        ParametersCommand::Set(args) => set(api, args).await?,
        ParametersCommand::Show { instance } => instance,
    };
    let found = api
        .describe_instances(std::slice::from_ref(&instance_id))
        .await?;
    let Some(instance) = found.into_iter().next() else {
        let status = tonic::Status::not_found(format!("instance {instance_id} does not exist"));
        return Err(Failure::from_status(&status));
    };
    Ok(show(output, &ParametersView::from(instance))?)
}

/// Does a `durability` command and shows the instance.
///
/// # Errors
/// As the controller answered.
pub async fn on_durability(
    api: &mut Api,
    command: DurabilityCommand,
    output: Output,
) -> Result<(), Failure> {
    let DurabilityCommand::Set {
        instance: instance_id,
        replicas,
        client_token,
    } = command;
    let request = instance::SetDurabilityRequest {
        instance_id: instance_id.clone(),
        durability: replicas,
        client_token: Api::token(Some(client_token)),
    };
    api.call(|api| {
        let request = request.clone();
        async move { api.instances().set_durability(request).await }
    })
    .await?;
    let found = api.describe_instances(&[instance_id]).await?;
    let views: Vec<_> = found.into_iter().map(InstanceView::from).collect();
    Ok(show(output, &views)?)
}

/// Sets an instance's maintenance window and shows the instance.
///
/// # Errors
/// As the controller answered.
pub async fn on_window(
    api: &mut Api,
    instance_id: String,
    maintenance_window: String,
    output: Output,
) -> Result<(), Failure> {
    let request = instance::ModifyInstanceMaintainTimeRequest {
        instance_id: instance_id.clone(),
        maintenance_window,
        client_token: Api::token(None),
    };
    api.call(|api| {
        let request = request.clone();
        async move { api.instances().modify_instance_maintain_time(request).await }
    })
    .await?;
    let found = api.describe_instances(&[instance_id]).await?;
    let views: Vec<_> = found.into_iter().map(InstanceView::from).collect();
    Ok(show(output, &views)?)
}

async fn set(api: &mut Api, args: ParametersSetArgs) -> Result<String, Failure> {
    let request = instance::UpdateParametersRequest {
        instance_id: args.instance.clone(),
        engine: args.engine.into_iter().collect(),
        proxy: args.proxy.into_iter().collect(),
        client_token: Api::token(None),
    };
    api.call(|api| {
        let request = request.clone();
        async move { api.instances().update_parameters(request).await }
    })
    .await?;
    Ok(args.instance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_sent_as_its_hash_only() {
        let hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
        assert_eq!(hashed(">secret"), format!("#{hash}"));
        assert_eq!(hashed("<secret"), format!("!{hash}"));
        for rule in ["on", "~a>b", "#abc", "+@all"] {
            assert_eq!(hashed(rule), rule);
        }
    }
}
