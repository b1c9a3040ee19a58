#pragma once

// The settings of each policy, as Python has them: written by tools/presets.py.

struct kvmerge_preset {
    const char * name;
    const char * settings;
};

static const kvmerge_preset KVMERGE_PRESETS[] = {
    { "auto", "score=0,allocate=0,select=5,match=4,fold=0,bias=2,move_keys=1,pool_max=0,value_norm=1,n_window=16,n_keep=4,n_sink=4,n_flow_rows=64,n_pool=21,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0.5,cover=0.9,similarity=-1,pivots=0,text=0.5,text_pivots=0.75" },
    { "d2o", "score=2,allocate=0,select=0,match=1,fold=3,bias=0,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=0,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0.5,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "evict", "score=0,allocate=0,select=0,match=0,fold=0,bias=0,move_keys=0,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=4,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "flowmm", "score=0,allocate=0,select=0,match=3,fold=0,bias=2,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=4,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=0.8,recent=0,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "h2o", "score=2,allocate=0,select=0,match=0,fold=0,bias=0,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=0,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0.5,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "kvmerger", "score=0,allocate=0,select=4,match=4,fold=4,bias=0,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=4,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "look-m", "score=2,allocate=0,select=1,match=1,fold=1,bias=0,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=0,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0.1,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "madakv", "score=0,allocate=2,select=2,match=0,fold=0,bias=0,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=4,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "meda", "score=2,allocate=3,select=0,match=1,fold=0,bias=0,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=0,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0.5,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "mosaic", "score=0,allocate=4,select=3,match=4,fold=0,bias=2,move_keys=1,pool_max=0,value_norm=1,n_window=16,n_keep=4,n_sink=1,n_flow_rows=64,n_pool=3,n_floor=1,n_member=2,theta=0.25,tau=1,recent=0,cover=0.9,similarity=-1,pivots=0,text=0.9,text_pivots=0" },
    { "pyramid", "score=0,allocate=1,select=0,match=0,fold=0,bias=0,move_keys=1,pool_max=1,value_norm=0,n_window=16,n_keep=0,n_sink=0,n_flow_rows=64,n_pool=5,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "snapkv", "score=0,allocate=0,select=0,match=0,fold=0,bias=0,move_keys=1,pool_max=1,value_norm=0,n_window=16,n_keep=0,n_sink=0,n_flow_rows=64,n_pool=5,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
    { "streaming", "score=1,allocate=0,select=0,match=0,fold=0,bias=0,move_keys=1,pool_max=0,value_norm=0,n_window=16,n_keep=0,n_sink=4,n_flow_rows=64,n_pool=1,n_floor=1,n_member=0,theta=0.25,tau=1,recent=0,cover=0.9,similarity=-1,pivots=0.5,text=0.5,text_pivots=0.75" },
};
