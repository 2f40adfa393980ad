//! What runs where, and what to try first.

use birb_nest_stack::{Environment, Stack};

/// Prints the table, without API and worker if only the servers run.
pub(crate) fn print(stack: &Stack, environment: &Environment, servers_only: bool) {
    let root = stack.root().display();
    let (redis, nats, postgres) = (stack.redis.port(), stack.nats.port(), stack.postgres.port());
    let (api, worker) = (environment.api_url(), environment.worker_url());
    println!("\n  birb-nest on this machine; Ctrl-C stops it\n");
    if !servers_only {
        println!("  API         {api}");
        println!("  Worker      {worker}/metrics");
    }
    println!("  Redis       redis-cli -p {redis}");
    println!("  NATS        nats://127.0.0.1:{nats}");
    println!("  PostgreSQL  psql postgres://birb:birb@127.0.0.1:{postgres}/birb_nest");
    println!("  Data        {root}/redis, nats, postgres");
    println!("  Logs        {root}/logs/*.log");
    println!("  Variables   {root}/env\n");
    if servers_only {
        return;
    }
    let key = format!("{api}/v1/cache/greeting");
    println!("  Try:");
    println!(
        "    curl -i -X POST {key} -H 'Content-Type: application/json' -d '{{\"value\": \"hello\", \"ttl\": 3600}}'"
    );
    println!("    curl -i {key}");
    println!(
        "    kill -9 {}   # Redis dies, comes back empty, and the entry is still there",
        stack.redis.pid().unwrap_or_default()
    );
    println!("    curl -i -X DELETE {key}");
    println!("    curl {api}/health\n");
}
