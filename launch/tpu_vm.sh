#!/usr/bin/env bash
# TPU VM: one worker of a sweep, on all hosts of a slice that is asked for as a queued resource and given back at the end. `tuning sweep
# --runner=tpu_vm` fills in what stands in ${...} in small letters, writes such a file for each worker to the sweep's directory, and runs
# them. SIGTERM saves the run and gives the slice back.
where=(--project=${project} --zone=${zone})
worker=""

state() { gcloud compute tpus queued-resources describe ${name} "${where[@]}" --format='value(state.state)' 2>/dev/null; }
on_all_hosts() { gcloud compute tpus tpu-vm ssh ${name} "${where[@]}" --ssh-flag=-oServerAliveInterval=30 --worker=all --command="$1"; }
give_back() { gcloud compute tpus queued-resources delete ${name} "${where[@]}" --force --quiet; }

create() {
    gcloud compute tpus queued-resources create ${name} "${where[@]}" --node-id=${name} \
        --accelerator-type=${type} --runtime-version=${version} ${options}
}

until_granted() {
    while true; do
        case "$(state)" in
            ACTIVE) return ;;
            "") create || exit ;;
            SUSPENDED) give_back ;; # it was taken away
            FAILED) give_back && exit 1 ;;
            *)
                sleep ${poll} &
                wait "$!"
                ;;
        esac
    done
}

stop() {
    if [ -n "$worker" ]; then
        on_all_hosts ${stop}
        wait "$worker"
    fi
    give_back
    exit 143
}
trap stop TERM

for _ in $(seq 0 ${restarts}); do
    until_granted
    on_all_hosts ${command} &
    worker=$!
    wait "$worker"
    status=$?
    worker=""
    [ "$status" -ne 0 ] || break
done
give_back
exit "$status"
