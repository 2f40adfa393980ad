//! Prints the CustomResourceDefinition as YAML: the source of crds/.

use birb_nest_operator::api::BirbNest;
use kube::CustomResourceExt;

fn main() -> anyhow::Result<()> {
    print!("{}", serde_yaml::to_string(&BirbNest::crd())?);
    Ok(())
}
